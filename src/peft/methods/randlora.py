"""RandLoRA: an update of full rank from random matrices that all layers share, of which scales are learnt.

    W' = W + s D,   D = sum over j of B_j diag(l_j) A diag(g_j) (tall; turned for W wide),   s = alpha / r

With m = min(out, in) and n = ceil(m / r), A is (r, m) and B (max(out, in), n, r): parts of one pair for the model;
l (r, n) and g (n, m) are learnt. l starts at zero, so training starts at the base model. A and B come from a seed, and
files may leave them out. Source: Albert et al. 2025, arXiv 2502.00987, eq. 4. As in the peer's files, column c of B,
counted over (n, r), meets row c of the scaled A, counted over (r, n); the paper pairs them by (n, r), which is the same
in distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.defaults import BNB_LAYERS
from ..core.layer import name_layers
from ..core.method import LowRank, Site
from ..core.scale import ScaledLayer
from ..core.shared import Shared, drawn, seeded_on
from ..core.stack import Adapter, Stack
from ..kernels.modes import numbered
from ..kernels.product import scaled_rows
from ..target_config import Alpha, OrAuto, probability
from .additive import AdditiveConfig, AdditiveModel
from .vera import warn_unsaved


@dataclass
class RandLoraConfig(Alpha, AdditiveConfig):
    """The configuration of RandLoRA."""

    kind = "RANDLORA"
    alpha_name, alpha_per_rank = "randlora_alpha", 20  # as at the default
    added = frozenset({"exclude_modules"})
    r: int = field(default=32, metadata=describe("Rank of each shared pair; smaller trains more numbers."))
    projection_prng_key: int = field(default=0, metadata=describe("Seed of the shared matrices."))
    save_projection: bool = field(default=True, metadata=describe("Keep the shared matrices in files."))
    sparse: bool = field(default=False, metadata=describe("Shared matrices of -1, 0, 1, a third of them not 0."))
    very_sparse: bool = field(default=False, metadata=describe("Fewer: one of the root of the smaller size."))
    randlora_dropout: float = field(default=0.0, metadata=describe("Dropout on the input, in [0, 1)."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    randlora_alpha: OrAuto = field(
        default=640, metadata=describe("The update is multiplied by alpha / r. 'auto' is 20 r.")
    )
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))

    def check(self) -> None:
        """Numbers, and a word about what files will lack."""
        probability("randlora_dropout", self.randlora_dropout)
        for pattern, settings in (self.module_config or {}).items():
            if "r" in settings:
                raise ValueError(f"module_config[{pattern!r}] sets r, but the shared matrices are cut for one rank.")
        warn_unsaved(self, "randlora_A and randlora_B")


class RandLoRA(LowRank):
    """W' = W + s B A, of as many columns and rows as W has at least."""

    dropout = "randlora_dropout"
    copies = ("randlora_A", "randlora_B")

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]]) -> dict[str, Shared]:
        small, large = sorted(map(max, zip(*(s[-2:] for s in shapes), strict=True)))
        need = (settings.r, 1, small), (large, math.ceil(small / settings.r), settings.r)
        made = zip(self.copies, draw(*need, settings), strict=True)
        return {name: Shared(t, settings.save_projection) for name, t in made}

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        n, m = math.ceil(min(out, inp) / c.r), min(out, inp)
        return {
            "randlora_dropout": site.dropout("randlora_dropout"),
            "randlora_lambda": nn.Parameter(torch.zeros(*lead, c.r, n, **site.kwargs)),
            "randlora_gamma": nn.Parameter(torch.full((*lead, n, m), 1 / max(n, m), **site.kwargs)),
            "r": c.r,
            "scaling": c.randlora_alpha / c.r,
            "tall": out >= inp,
            "larger": max(out, inp),
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        if not p.settings.init_weights:
            p.randlora_lambda.normal_()
            p.randlora_gamma.fill_(1 / p.larger)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        scale, gains = p.held("randlora_lambda"), p.held("randlora_gamma")
        A, B = (t.to(scale.device, scale.dtype) for t in (p.randlora_A, p.randlora_B))
        n, m = gains.shape[-2:]
        rows = scaled_rows(scale, A[: p.r, 0, :m], gains).flatten(-3, -2)
        columns = B[: p.larger, :n, : p.r].flatten(1)
        return (rows, columns) if p.tall else (columns.mT, rows.mT)

    def scaling(self, p: Adapter) -> float:
        return p.scaling


def draw(of_a: tuple[int, ...], of_b: tuple[int, ...], settings: Any) -> tuple[Tensor, Tensor]:
    """The shared pair from its seed, as the peer draws it: of unit deviation, and of bfloat16's values if dense."""
    generator = torch.Generator().manual_seed(settings.projection_prng_key)
    (r, _, small), (large, n, _) = of_a, of_b
    if settings.sparse or settings.very_sparse:
        rare = 1 / (2 * (math.sqrt(small) if settings.very_sparse else 3))
        pair = [torch.rand(size, generator=generator, dtype=torch.float32, device=seeded_on()) for size in (of_a, of_b)]
        pair = [(u > 1 - rare).float() - (u < rare).float() for u in pair]
    else:
        half = torch.bfloat16
        A = drawn(of_a, small**-0.5, generator, half)
        pair = [A, torch.cat([drawn((large, 1, r), r**-0.5, generator, half) for _ in range(n)], 1)]
    for t, size in zip(pair, (of_a, of_b), strict=True):
        if numbered(t) and (t == t.flatten()[0]).all():
            raise ValueError(
                f"r={r} and projection_prng_key={settings.projection_prng_key} draw a basis {size} of equal numbers, "
                "which cannot be brought to unit deviation. Use a larger r, or another key."
            )
    A, B = ((t / t.std()).float() for t in pair)
    return A, B


class RandLoraLayer(ScaledLayer):
    """A target under RandLoRA adapters."""

    family = "randlora"
    _sized = True
    adapter_layer_names = ("randlora_lambda", "randlora_gamma")
    other_param_names = ("r", "scaling", "randlora_dropout")
    _home_order = ("randlora_dropout", "randlora_lambda", "randlora_gamma")
    _parameter_homes = frozenset({"randlora_lambda", "randlora_gamma"})

    def natural_scaling(self, adapter: str) -> float:
        """alpha / r."""
        p = self.adapters[adapter]
        return p.settings.randlora_alpha / p.r


class RandLoraModel(AdditiveModel):
    """RandLoRA adapters on a model."""

    prefix = "randlora_"
    layer_classes = name_layers(RandLoraLayer, globals(), packed=BNB_LAYERS)
    method: ClassVar[RandLoRA] = RandLoRA()
