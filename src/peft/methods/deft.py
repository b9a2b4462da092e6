"""DEFT: what the weight does in a learnt subspace of the out-features is taken out, and replaced.

    W' = W + Q (s R - P' W0),   P (out, r), R (r, in), W0 the base weight,   s = alpha / r, or 1 without alpha

`relu`: Q = P and P' the transpose of relu(P). `qr`: Q is the orthonormal factor of P, and P' its transpose. With `para`
there is no R: the subspace is only taken out. R starts at P' W0 / s, so training starts at the base model. Different
from the peer: unmerging restores every bit of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.kept import kept
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import LowRank, Site
from ..core.stack import Adapter, Stack
from ..core.views.chosen import thinned
from ..kernels.modes import single
from ..target_config import choice, number, probability
from .additive import AdditiveConfig, AdditiveModel


@dataclass
class DeftConfig(AdditiveConfig):
    """The configuration of DEFT."""

    kind = "DEFT"
    r: int = field(default=8, metadata=describe("Dimensions of the subspace; at most the out-features."))
    decomposition_method: str = field(default="relu", metadata=describe("How P gives the subspace: 'relu' or 'qr'."))
    init_scale: float = field(default=1.0, metadata=describe("Scale of a random R."))
    alpha: int | None = field(default=None, metadata=describe("R is multiplied by alpha / r; by 1 if not set."))
    para: bool = field(default=False, metadata=describe("Take the subspace out, and put nothing in its place."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    deft_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of R, in [0, 1)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else R is random."))

    def check(self) -> None:
        """Numbers and choices."""
        choice("decomposition_method", self.decomposition_method, ("relu", "qr"))
        probability("deft_dropout", self.deft_dropout)
        number("init_scale", self.init_scale)
        if self.alpha is not None:
            number("alpha", self.alpha)
            if not self.alpha:
                raise ValueError("alpha=0 gives R no effect. Leave it out for a factor of 1, or use para=True.")


class DEFT(LowRank):
    """W' = W + Q (s R - P' W0)."""

    reads = True
    by_rows = False
    neutral_zeros = False  # a P of zeros has directions, too, where they come from a QR decomposition

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        r = min(c.r, out)
        learnt = {} if c.para else {"deft_R": nn.Parameter(torch.empty(*lead, r, inp, **site.kwargs))}
        return {
            "deft_dropout": site.dropout("deft_dropout"),
            "deft_P": nn.Parameter(torch.empty(*lead, out, r, **site.kwargs)),
            **learnt,
            "deft_r": r,
            "deft_decomposition": c.decomposition_method,
            "deft_init_scale": c.init_scale,
            "deft_para": c.para,
            "deft_scaling": c.alpha / r if c.alpha else 1.0,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        p.deft_P.normal_(0, 0.02)
        if p.deft_para:
            return
        if p.settings.init_weights:
            p.deft_R.copy_(self.removed(p)[1] / p.deft_scaling)
        else:
            p.deft_R.normal_(0, 0.02 * p.deft_init_scale)

    def removed(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """(Q, P' W0), in single precision at least."""
        P = p.held("deft_P")
        wide = single(P)
        Q, project = (wide, wide.relu()) if p.deft_decomposition == "relu" else (torch.linalg.qr(wide)[0],) * 2
        return Q, project.mT @ p.original_weight().to(wide.dtype)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        if not p.layer.view.dense or p.layer.packed is not None:
            return self.computed(p)
        return kept(p, lambda: self.computed(p), base=True, what="factors")

    def computed(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """`factors`, made now."""
        Q, taken = self.removed(p)
        return (-taken if p.deft_para else p.held("deft_R") * p.deft_scaling - taken), Q

    def read_delta(self, p: Adapter, W: Tensor) -> Tensor:
        rate = p.drop_rate("deft_dropout") if p.layer.view.drops and not p.deft_para else 0.0
        if not rate:
            return super().read_delta(p, W)
        Q, taken = self.removed(p)
        return Q @ (thinned((p.held("deft_R") * p.deft_scaling).to(Q.dtype), rate) - taken)

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        rate = p.drop_rate("deft_dropout")
        if not rate or p.deft_para:
            return super().onto(p, inner, y, x)
        Q, taken = self.removed(p)
        given = (p.held("deft_R") * p.deft_scaling).to(Q.dtype)
        if inner.view.groups(inner.base) == 1:
            return (y + inner.low_rank(x, given, Q, rate) - inner.low_rank(x, taken, Q)).to(y.dtype)
        thin, factor = inner.drop(x, rate, Q.dtype)
        update = inner.linear(thin, Q @ given)
        update = update if factor is None else update * factor
        return (y + update - inner.linear(x, Q @ taken)).to(y.dtype)


class DeftLayer(BaseTunerLayer):
    """A target under DEFT adapters."""

    family = "deft"
    adapter_layer_names = ("deft_P", "deft_R")
    other_param_names = (
        "deft_r",
        "deft_decomposition",
        "deft_init_scale",
        "deft_para",
        "deft_scaling",
        "deft_dropout",
    )
    _home_order = ("deft_P", "deft_R", "deft_dropout")
    _parameter_homes = frozenset({"deft_P", "deft_R"})


class DeftModel(AdditiveModel):
    """DEFT adapters on a model."""

    prefix = "deft_"
    layer_classes = name_layers(DeftLayer, globals(), "Deft")
    method: ClassVar[DEFT] = DEFT()
