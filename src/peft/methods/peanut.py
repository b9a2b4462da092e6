"""PEANuT: a small network that reads the frozen weight gives the update; its inputs are the weight's columns.

    W' = W + s B Z',   Z_0 = f(W0' A'),   Z_t+1 = f(Z_t E_t'),   then for t < depth:  Z <- f(Z D_t') + Z_(depth-1-t)

W0 is the base weight, A (r, out), B (out, r), E_t and D_t (r, r), f an activation. The update has rank r at most. B
starts at zero, so training starts at the base model. Source: Zhong et al. 2024, arXiv 2410.01870. Different from the
peer: every layout, and unmerging restores every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import describe
from ..core.draw import kaiming
from ..core.layer import name_layers
from ..core.method import LowRank, Site
from ..core.scale import ScaledLayer
from ..core.stack import Adapter, Stack
from ..core.views import linear_module
from ..errors import nearest
from ..target_config import number
from .additive import AdditiveConfig, AdditiveModel

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in ("relu", "gelu", "silu", "mish", "leaky_relu", "relu6")},
    **{name: getattr(torch, name) for name in ("tanh", "sigmoid", "sin")},
    "swish": F.silu,
}
HOMES = ("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders")
DEEPEST = 1000  # a network that no one trains; files may say anything


@dataclass
class PeanutConfig(AdditiveConfig):
    """The configuration of PEANuT."""

    kind = "PEANUT"
    added = frozenset({"bias"})
    r: int = field(default=32, metadata=describe("Width of the network, and rank of the update."))
    depth: int = field(default=0, metadata=describe("Pairs of hidden layers."))
    act_fn: str = field(default="relu", metadata=describe("Activation: a name that transformers knows."))
    scaling: float = field(default=1.0, metadata=describe("The update is multiplied by it."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else B is random, too."))

    def check(self) -> None:
        """Numbers and names."""
        number("scaling", self.scaling)
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or not 0 <= self.depth <= DEEPEST:
            raise ValueError(f"`depth` must be an integer from 0 to {DEEPEST}; got {self.depth!r}.")
        activation(self.act_fn)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name.

    Raises ValueError if there is none.
    """
    if name in PLAIN:
        return PLAIN[name]
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        known: dict[str, Any] = {}
    else:
        known = ACT2FN
    if name not in known:
        names = sorted({*PLAIN, *known})
        more = "" if known else " Others need transformers installed."
        raise ValueError(f"act_fn={name!r} is unknown.{nearest(str(name), names)} Use one of {', '.join(names)}.{more}")
    found: Callable[[Tensor], Tensor] = known[name]
    if isinstance(found, nn.Module) and any(True for _ in found.parameters()):
        raise ValueError(f"act_fn={name!r} has parameters of its own, which no file would hold. Use 'relu' or 'gelu'.")
    return found


class PEANuT(LowRank):
    """W' = W + s B Z'."""

    reads = True
    by_rows = False

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, _ = site.view.shape(site.module)
        square = [[_holder(site, lead, c.r, c.r) for _ in range(c.depth)] for _ in range(2)]
        return {
            "peanut_A": _holder(site, lead, c.r, out),
            "peanut_B": _holder(site, lead, out, c.r),
            "peanut_encoders": nn.ModuleList(square[0]),
            "peanut_decoders": nn.ModuleList(square[1]),
            "r": c.r,
            "depth": c.depth,
            "scaling": c.scaling,
            "act_fn": c.act_fn,
            "res_num": c.depth,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        for held in (p.peanut_A, *p.peanut_encoders, *p.peanut_decoders):
            kaiming(held.weight)
        kaiming(p.peanut_B.weight)
        if p.settings.init_weights:
            p.peanut_B.weight.zero_()

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        A, B, f = p.held("peanut_A").weight, p.held("peanut_B").weight, activation(p.act_fn)
        Z = f(A @ p.original_weight().to(A.dtype))  # turned: a column for each in-feature, as all below
        kept = []
        for held in p.held("peanut_encoders"):
            kept.append(Z)
            Z = f(held.weight @ Z)
        for held in p.held("peanut_decoders"):
            Z = f(held.weight @ Z) + kept.pop()
        return Z, B

    def scaling(self, p: Adapter) -> float:
        return p.scaling


def _holder(site: Site, lead: list[int], out: int, inp: int) -> nn.Linear:
    held = linear_module(inp, out, **site.kwargs)
    if lead:
        held.weight = nn.Parameter(torch.empty(*lead, out, inp, **site.kwargs))
    return held


class PeanutLayer(ScaledLayer):
    """A target under PEANuT adapters."""

    family = "peanut"
    adapter_layer_names = HOMES
    other_param_names = ("r", "depth", "scaling", "act_fn", "res_num")

    def natural_scaling(self, adapter: str) -> float:
        """The configuration's `scaling`."""
        return float(self.adapters[adapter].settings.scaling)


class PeanutModel(AdditiveModel):
    """PEANuT adapters on a model."""

    prefix = "peanut_"
    layer_classes = name_layers(PeanutLayer, globals())
    method: ClassVar[PEANuT] = PEANuT()
