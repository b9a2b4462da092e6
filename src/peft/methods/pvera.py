"""PVeRA: VeRA whose inner features are drawn from a distribution that the input gives, in training.

    h = m + e exp(v / 2),   (m, v) = diag(d) A x,  A (2 r, in),  e ~ N(0, 1);      W' x = W x + diag(b) B h

Outside training, and when merged, h = m:  W' = W + diag(b) B diag(d1) A1, with the first halves of d and A. Modules
that read their weights (attention, parameters) and convolutions with groups train on m as well. A and B are shared by
all layers, as VeRA's are. Source: arXiv 2512.07703.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import describe
from ..core.defaults import BNB_LAYERS
from ..core.direct import open_linear
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Site
from ..core.stack import Adapter, Stack
from ..target_config import probability
from .additive import AdditiveConfig, AdditiveModel
from .vera import VeRA, warn_unsaved


@dataclass
class PveraConfig(AdditiveConfig):
    """The configuration of PVeRA."""

    kind = "PVERA"
    added = frozenset({"exclude_modules"})
    r: int = field(default=256, metadata=describe("Rank; A has twice as many rows."))
    projection_prng_key: int = field(default=0, metadata=describe("Seed of the shared matrices."))
    save_projection: bool = field(default=True, metadata=describe("Keep the shared matrices in files."))
    pvera_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of A, in [0, 1)."))
    d_initial: float = field(default=0.1, metadata=describe("First value of d."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))
    sample_at_inference: bool = field(default=False, metadata=describe("Draw h outside training, too."))
    generator_seed: int | None = field(
        default=None, metadata=describe("Seed of each layer's own draws; the global generator if not set.")
    )

    def check(self) -> None:
        """Numbers, and a word about what files will lack."""
        probability("pvera_dropout", self.pvera_dropout)
        warn_unsaved(self, "pvera_A and pvera_B")


class PVeRA(VeRA):
    """W' = W + diag(b) B diag(d1) A1, and noise in training."""

    word = "pvera"
    dropout = "pvera_dropout"
    sums_from = inf  # what is drawn is drawn for each row
    rows = 2

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        state = None if c.generator_seed is None else torch.Generator().manual_seed(c.generator_seed).get_state()
        return {**super().build(site), "sample_at_inference": c.sample_at_inference, "noise": [state]}

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        stated = type(self).onto is PVeRA.onto
        held = open_linear(inner, x) if stated else None
        called = stated and self.apart_from(p, inner)
        return self.apart(p, inner, x, held) if held is not None or called else None

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if not self.draws(p) or inner.view.groups(inner.base) != 1:
            return super().onto(p, inner, y, x)
        A, B = self.factors(p)
        x, factor = inner.drop(x, self.drop_rate(p), A.dtype)
        middle, spread = (inner.linear(x, half) for half in (A, self.down(p, slice(p.r, 2 * p.r))))
        if factor is not None:
            middle, spread = middle * factor, spread * factor
        h = middle + drawn_like(middle, p.noise) * (spread / 2).exp()
        return (y + inner.view.rows(h, B)).to(y.dtype)

    def wanted(self, p: Adapter) -> int:
        return 2 * p.r if self.draws(p) else p.r

    def middle(self, p: Adapter, h: Tensor, d: Tensor) -> Tensor:
        if not self.draws(p):
            return h * d
        (m, v), (of_m, of_v) = h.split(p.r, -1), d.split(p.r)
        m = m * of_m
        return torch.addcmul(m, drawn_like(m, p.noise), (v * (of_v / 2)).exp())

    def draws(self, p: Adapter) -> bool:
        """Whether h is drawn."""
        return p.layer.training or p.sample_at_inference


def drawn_like(t: Tensor, held: list[Any]) -> Tensor:
    """Normal numbers; from a generator of the layer's own, whose state is held and moves on, if there is one."""
    if held[0] is None:
        return torch.randn_like(t)
    generator = torch.Generator()
    generator.set_state(held[0])
    found = torch.randn(t.shape, dtype=t.dtype, generator=generator, device="cpu")
    held[0] = generator.get_state()
    return found.to(t.device)


class PveraLayer(BaseTunerLayer):
    """A target under PVeRA adapters."""

    family = "pvera"
    _sized = True
    adapter_layer_names = ("pvera_lambda_b", "pvera_lambda_d")
    other_param_names = ("r", "pvera_dropout", "sample_at_inference")
    _home_order = ("pvera_dropout", "pvera_lambda_b", "pvera_lambda_d")
    _parameter_homes = frozenset({"pvera_lambda_b", "pvera_lambda_d"})


class PveraModel(AdditiveModel):
    """PVeRA adapters on a model."""

    prefix = "pvera_lambda_"
    uses_shared_state = True
    layer_classes = name_layers(PveraLayer, globals(), packed=BNB_LAYERS)
    method: ClassVar[PVeRA] = PVeRA()
