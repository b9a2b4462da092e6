"""VeRA: random matrices that all layers share, frozen, and two learnt vectors for each layer.

    W' = W + diag(b) B diag(d) A,   A (r, in), B (out, r): the first columns and rows of one pair for the whole model

b starts at zero, so training starts at the base model. A and B come from a seed, and files may leave them out. Source:
Kopiczko et al. 2023, arXiv 2310.11454, eq. 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import LowRank, Site
from ..core.shared import Shared, drawn
from ..core.stack import Adapter, Stack
from ..errors import PeftWarning
from ..target_config import probability
from .additive import AdditiveConfig, AdditiveModel


@dataclass
class VeraConfig(AdditiveConfig):
    """The configuration of VeRA."""

    kind = "VERA"
    added = frozenset({"exclude_modules"})
    r: int = field(default=256, metadata=describe("Rank of the shared matrices."))
    projection_prng_key: int = field(default=0, metadata=describe("Seed of the shared matrices."))
    save_projection: bool = field(default=True, metadata=describe("Keep the shared matrices in files."))
    vera_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of A, in [0, 1)."))
    d_initial: float = field(default=0.1, metadata=describe("First value of d."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))

    def check(self) -> None:
        """Numbers, and a word about what files will lack."""
        probability("vera_dropout", self.vera_dropout)
        warn_unsaved(self, "vera_A and vera_B")


def warn_unsaved(config: Any, names: str) -> None:
    """Say what files will lack under save_projection=False."""
    if not config.save_projection:
        text = (
            f"save_projection=False keeps {names} out of files; they are drawn again from projection_prng_key, which "
            "gives the same numbers only where the generator is the same."
        )
        warnings.warn(text, PeftWarning, stacklevel=6)


class VeRA(LowRank):
    """W' = W + diag(b) B diag(d) A."""

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]], known: dict[str, Tensor]) -> dict[str, Shared]:
        (out, inp), r = map(max, zip(*(s[-2:] for s in shapes), strict=True)), settings.r
        if "vera_A" in known:
            A, B = known["vera_A"], known["vera_B"]
            if A.shape[0] < r or A.shape[1] < inp or B.shape[0] < out:
                raise ValueError(
                    f"The model's shared vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)} are too small for this "
                    f"adapter, which needs ({r}, {inp}) and ({out}, {r}). Add the adapter with the larger needs first."
                )
        else:
            generator = torch.Generator().manual_seed(settings.projection_prng_key)
            A = drawn((r, inp), (6 / inp) ** 0.5, generator)
            B = drawn((out, r), (6 / r) ** 0.5, generator)
        return {"vera_A": Shared(A, settings.save_projection), "vera_B": Shared(B, settings.save_projection)}

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, _ = site.view.shape(site.module)
        return {
            "vera_dropout": site.dropout("vera_dropout"),
            "vera_lambda_b": nn.Parameter(torch.zeros(*lead, out, **site.kwargs)),
            "vera_lambda_d": nn.Parameter(torch.full((*lead, c.r), float(c.d_initial), **site.kwargs)),
            "r": c.r,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        if not p.settings.init_weights:
            p.vera_lambda_b.fill_(1)
            p.vera_lambda_d.normal_()

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        b, d = p.held("vera_lambda_b"), p.held("vera_lambda_d")
        inp = p.layer.view.shape(p.layer.get_base_layer())[-1]
        A, B = (t.to(b.device, b.dtype) for t in (p.vera_A, p.vera_B))
        return d[..., None] * A[: p.r, :inp], b[..., None] * B[: b.shape[-1], : p.r]

    def drop_rate(self, p: Adapter) -> float:
        return p.drop_rate("vera_dropout")


class VeraLayer(BaseTunerLayer):
    """A target under VeRA adapters."""

    family = "vera"
    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    other_param_names = ("r", "vera_dropout")
    _home_order = ("vera_dropout", "vera_lambda_b", "vera_lambda_d")
    _parameter_homes = frozenset({"vera_lambda_b", "vera_lambda_d"})


class VeraModel(AdditiveModel):
    """VeRA adapters on a model."""

    prefix = "vera_lambda_"
    layer_classes = name_layers(VeraLayer, globals())
    method: ClassVar[VeRA] = VeRA()
