"""Lily: low-rank updates whose factors layers share, and a router in each layer that mixes the shared experts.

    y = W x + b + s B' h,   h = A x,   B = sum over e of p_e B_e,   p = the mean over all inputs of softmax(G h)

A (r, in) is shared by `stride_A` layers that follow each other; the experts B_e (r, out) by all layers of one kind
(the same target's name and shapes); the router G (experts, r) is a layer's own. The mean is over all positions of the
samples that run the adapter together. B starts at zero, so training starts at the base model. The update depends on
the input, so nothing is merged, and modules that read their weights (attention, parameters) cannot have one. Source:
Zhong et al. 2024, arXiv 2407.09946. Different from the peer: adapters added later share; more layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import describe
from ..core.direct import open_linear
from ..core.draw import kaiming
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Delta, Site
from ..core.place import Injection
from ..core.scale import ScaledLayer
from ..core.stack import Adapter, Stack
from ..core.tuner import BaseTuner
from ..core.views import READS, linear_module
from ..kernels import onto
from ..target_config import TargetConfig, number

HOMES, NUMBERS = ("lily_A", "lily_B", "lily_router"), ("r", "scaling", "stride_A", "num_B")


@dataclass
class LilyConfig(TargetConfig):
    """The configuration of Lily."""

    kind = "LILY"
    added = frozenset({"bias"})
    ranks = ("r", "stride_A")
    r: int = field(default=32, metadata=describe("Rank."))
    stride_A: int = field(default=1, metadata=describe("How many layers in a row share A."))
    num_B: int = field(default=2, metadata=describe("Experts that the layers of one kind share; at least 2."))
    scaling: float = field(default=1.0, metadata=describe("The update is multiplied by it."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else B is random, too."))

    def check(self) -> None:
        """Numbers."""
        number("scaling", self.scaling)
        if self.num_B < 2:
            raise ValueError(f"num_B={self.num_B} leaves the router nothing to choose. Use at least 2.")


class Lily(Delta):
    """y = W x + b + s B' h."""

    additive = False
    mergeable = False
    by_input = True

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        if not site.view.activations or (site.layer is not None and site.layer._read == READS):
            raise ValueError(
                f"{site.path!r} cannot have a Lily adapter: its module reads the weight, and Lily's update depends on "
                "the layer's input. Leave it out (`exclude_modules`), or use another method for it."
            )
        out, inp = site.view.shape(site.module)
        return {
            "lily_A": linear_module(inp, c.r, **site.kwargs),
            "lily_B": linear_module(out, c.num_B * c.r, **site.kwargs),
            "lily_router": linear_module(c.r, c.num_B, **site.kwargs),
            **{name: getattr(c, name) for name in NUMBERS},
        }

    def repeated(self, built: Mapping[str, Any], path: str, names: Any, before: dict[Any, int]) -> tuple[str, ...]:
        """The names of what `build` made that a layer before has already, as `Sharing` puts them together."""
        kind = suffix(path, names), tuple(built[name].weight.shape for name in HOMES), built["stride_A"]
        i = before[kind] = before.get(kind, -1) + 1
        return ("lily_B",) * (i > 0) + ("lily_A",) * (i % built["stride_A"] > 0)

    def init(self, p: Adapter, inner: Stack) -> None:
        for name in HOMES:
            kaiming(getattr(p, name).weight)
        if p.settings.init_weights:
            p.lily_B.weight.zero_()

    def refuse_merge(self, p: Adapter) -> NoReturn:
        at = f"The adapter {p.name!r} at {p.path!r}"
        raise NotImplementedError(f"{at} mixes its experts as the input has it, so it cannot be merged. Keep it apart.")

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        self.refuse_merge(p)

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held, (A, experts, G) = open_linear(inner, x), (p.held(name).weight for name in HOMES)
        if held is None or type(self).onto is not Lily.onto or not x.numel():
            return None
        h = F.linear(x.reshape(-1, x.shape[-1]).to(A.dtype), A)
        B = (F.linear(h, G).softmax(-1).mean(0, True) @ experts.reshape(p.num_B, -1)).view(p.r, -1)
        return onto.thin(x, *held, (h, B, p.scaling))

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        (A, experts, G), groups = (p.held(name).weight for name in HOMES), inner.view.groups(inner.base)
        axis = -inner.spread(A.new_empty(1)).dim()  # of the features
        h = inner.linear(x, A.repeat(groups, 1) if groups > 1 else A)
        each = h.movedim(axis % h.dim(), -1).unflatten(-1, (groups, -1))  # every group's rows see features of their own
        p_e = F.linear(each, G).softmax(-1).flatten(0, -2)
        p_e = p_e.mean(0) if p_e.shape[0] else p_e.sum(0)  # traces would take a number of rows for a constant
        B = torch.einsum("e,ero->or", p_e, experts.unflatten(0, (p.num_B, -1)))
        B = torch.block_diag(*B.unflatten(0, (groups, -1))) if groups > 1 else B
        return (y + inner.view.rows(h, B) * p.scaling).to(y.dtype)


class Sharing(Injection):
    """Puts the layers' factors together once all are placed."""

    def _tied_adapters(self, plan: Any) -> None:
        super()._tied_adapters(plan)
        kinds: dict[Any, list[BaseTunerLayer]] = {}
        targets = plan.target_modules or self.config.target_modules  # those that files have, so that they share alike
        for layer in self.placed:
            p = layer.adapters[self.name]
            shapes = tuple(getattr(p, name).weight.shape for name in HOMES)
            kinds.setdefault((suffix(p.path, targets), shapes, p.stride_A), []).append(layer)
        for (_, _, stride), alike in kinds.items():
            for i, layer in enumerate(alike):
                for home, source in (("lily_A", alike[i - i % stride]), ("lily_B", alike[0])):
                    layer._modules[home]._modules[self.name] = source._modules[home]._modules[self.name]  # type: ignore


def suffix(path: str, targets: Any) -> str:
    """The target's name that selects a path; "" for an expression (as there)."""
    found = [name for name in targets or () if f".{path}".endswith(f".{name}")]
    return "" if isinstance(targets, str) else max(found, key=len, default=path.rpartition(".")[2])


class LilyLayer(ScaledLayer):
    """A target under Lily adapters."""

    family = "lily"
    adapter_layer_names = HOMES
    other_param_names = NUMBERS

    def natural_scaling(self, adapter: str) -> float:
        return float(self.adapters[adapter].settings.scaling)


class LilyModel(BaseTuner):
    """Lily adapters on a model."""

    prefix = "lily_"
    layer_classes = name_layers(LilyLayer, globals())
    method: ClassVar[Lily] = Lily()
    injection = Sharing
