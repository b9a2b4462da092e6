"""LoHa: the element-wise product of two low-rank matrices, of rank up to r * r.

    W' = W + s (A1 B1) * (A2 B2),   A (out, r), B (r, in),   s = alpha / r

On a convolution `in` is channels of a group times kernel. With `use_effective_conv2d` each factor is a Tucker product
with a core T (r, r, kernel) instead:  sum over u, v of T[u, v] A[u, out] B[v, channels].  B2 starts at zero, so
training starts at the base model. Sources: FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098, propositions 1 and 3;
LyCORIS, Yeh et al. 2023, arXiv 2309.14859. Different from the peer: the update of a convolution is padded as its layer
is, so that merging keeps the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core import draw
from ..core.layer import name_layers
from ..core.method import Site
from ..core.scale import ScaledLayer
from ..core.stack import Adapter, Stack
from ..core.thinned import Thinned
from ..kernels import product
from ..target_config import Alpha, OrAuto, probability
from .additive import AdditiveConfig, AdditiveModel

NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


@dataclass
class LycorisConfig(Alpha, AdditiveConfig):
    """What LoHa and LoKr share."""

    added = frozenset({"bias"})
    alpha_per_rank = 1  # as at the default
    rank_pattern: dict | None = field(
        default_factory=dict, metadata=describe("Ranks that differ from r: {regular expression of names: rank}.")
    )
    alpha_pattern: dict | None = field(
        default_factory=dict, metadata=describe("Values that differ from alpha, written as `rank_pattern`.")
    )
    r: int = field(default=8, metadata=describe("Rank."))
    alpha: OrAuto = field(default=8, metadata=describe("The update is multiplied by alpha / r. 'auto' is r."))
    rank_dropout: float = field(
        default=0.0, metadata=describe("Share of the update's out-features that training drops at random.")
    )
    module_dropout: float = field(default=0.0, metadata=describe("How often training drops the update of a module."))
    use_effective_conv2d: bool = field(
        default=False, metadata=describe("Tucker products for convolutions whose kernel is larger than 1.")
    )

    def check(self) -> None:
        """Numbers."""
        probability("rank_dropout", self.rank_dropout)
        probability("module_dropout", self.module_dropout)

    def values(self) -> dict[str, Any]:
        """What an adapter holds beside its tensors."""
        return {
            "r": self.r,
            "alpha": self.alpha,
            "scaling": self.scaling_for(self.alpha, self.r),  # type: ignore[arg-type]
            "rank_dropout": self.rank_dropout,
            "rank_dropout_scale": getattr(self, "rank_dropout_scale", True),
            "module_dropout": self.module_dropout,
        }


@dataclass
class LoHaConfig(LycorisConfig):
    """The configuration of LoHa."""

    kind = "LOHA"
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else all at random."))


def core_shape(r: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a Tucker core; files hold that of a Conv1d with an axis more."""
    return (r, r, *(kernel if len(kernel) > 1 else (*kernel, 1)))


class LoHa(Thinned):
    """W' = W + s (A1 B1) * (A2 B2)."""

    def build(self, site: Site) -> dict[str, Any]:
        c, kernel = site.settings, site.view.kernel(site.module)
        *lead, out, inp = site.view.shape(site.module)
        effective = c.use_effective_conv2d and math.prod(kernel) > 1
        shapes: dict[str, tuple[int, ...]]
        if effective:
            a, b = (c.r, out), (c.r, inp // math.prod(kernel))
            shapes = {"hada_t1": core_shape(c.r, kernel), "hada_t2": core_shape(c.r, kernel)}
        else:
            a, b, shapes = (out, c.r), (c.r, inp), {}
        shapes.update(hada_w1_a=a, hada_w1_b=b, hada_w2_a=a, hada_w2_b=b)
        tensors = {n: nn.Parameter(torch.empty(*lead, *shapes[n], **site.kwargs)) for n in NAMES if n in shapes}
        return {**tensors, **c.values(), "effective": effective}

    def init(self, p: Adapter, inner: Stack) -> None:
        for name in NAMES:
            if p.has(name):
                draw.kaiming(p.held(name), p.held(name).dim() if "_t" in name else 2)
        if p.settings.init_weights:
            p.hada_w2_b.zero_()

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        if p.effective:
            return self.half(p, "1", rows) * self.half(p, "2", rows) * p.scaling
        a1, b1, a2, b2 = map(p.held, NAMES[:4])
        return product.hadamard(a1[..., rows, :], b1, a2[..., rows, :], b2) * p.scaling

    def short(self, p: Adapter) -> tuple[Tensor, Tensor, Any] | None:
        a, b = p.held("hada_w1_a"), p.held("hada_w1_b")
        if p.effective or self.thins(p) or a.dim() > 2 or not product.pays(len(b) ** 2, len(a), b.shape[1]):
            return None
        return *product.khatri_rao(*map(p.held, NAMES[:4])), p.scaling

    term = short

    def half(self, p: Adapter, which: str, rows: slice) -> Tensor:
        """One of the two low-rank matrices of Tucker cores, (rows, I)."""
        t, a, b = (p.held(f"hada_{name}") for name in (f"t{which}", f"w{which}_a", f"w{which}_b"))
        return product.tucker(t, a[:, rows], b).flatten(1)


class LycorisLayer(ScaledLayer):
    """A target under LoHa or LoKr adapters."""

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")

    def natural_scaling(self, adapter: str) -> float:
        """alpha / r."""
        p = self.adapters[adapter]
        return p.alpha / p.r


class LycorisModel(AdditiveModel):
    """LoHa or LoKr adapters on a model."""


class LoHaLayer(LycorisLayer):
    """A target under LoHa adapters."""

    family = "loha"
    adapter_layer_names = NAMES
    _parameter_homes = frozenset(NAMES)


class LoHaModel(LycorisModel):
    """LoHa adapters on a model."""

    prefix = "hada_"
    layer_classes = name_layers(LoHaLayer, globals())
    method: ClassVar[LoHa] = LoHa()
