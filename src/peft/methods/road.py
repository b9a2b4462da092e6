"""RoAd: pairs of output features turned and stretched by two learnt numbers each.

    W' = R W,  b' = R b;   on each pair  (y1, y2)  ->  (c1 y1 - d1 y2,  d2 y1 + c2 y2),   c = alpha cos theta,
    d = alpha sin theta

In groups of G outputs, output j is paired with j + G / 2. theta and alpha are one for each pair (`road_1`), one for
each output (`road_2`), or two for each output, of which c and d take one each (`road_4`). theta starts at zero and
alpha at one, so training starts at the base model. Source: Liao and Monz 2024, arXiv 2409.00119, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.defaults import BNB_LAYERS
from ..core.kept import kept
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Method, Site
from ..core.stack import Adapter, Stack
from ..core.tuner import BaseTuner
from ..kernels import pairs
from ..kernels.modes import eager
from ..target_config import TargetConfig, choice, rank

RoadVariant = Literal["road_1", "road_2", "road_4"]
VARIANTS = ("road_1", "road_2", "road_4")
EACH = dict(zip(VARIANTS, (1, 2, 4), strict=True))  # numbers for each pair, of theta and of alpha


@dataclass
class RoadConfig(TargetConfig):
    """The configuration of RoAd."""

    kind = "ROAD"
    added = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "bias"})
    ranks = ("group_size",)
    variant: str | RoadVariant = field(
        default="road_1", metadata=describe("Numbers per pair of outputs: 'road_1' two, 'road_2' four, 'road_4' eight.")
    )
    group_size: int = field(default=64, metadata=describe("Outputs that are paired among themselves; even."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))

    def check(self) -> None:
        """Groups are halved."""
        choice("variant", self.variant, VARIANTS)
        rank("group_size", self.group_size)
        if self.group_size % 2:
            raise ValueError(f"The group_size must be divisible by 2 when using RoadLayer; got {self.group_size}.")
        choice("init_weights", self.init_weights, (True, False))


class RoAd(Method):
    """W' = R W, b' = R b."""

    by_rows = False

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, _ = site.view.shape(site.module)
        alike = out // site.view.groups(site.module)  # outputs of one group of a convolution, which see the same inputs
        if alike % c.group_size:
            fits = [d for d in range(2, alike + 1, 2) if alike % d == 0]
            what = f"{out} outputs" if alike == out else f"{alike} outputs of each group"
            raise ValueError(
                f"group_size={c.group_size} does not divide the {what} of {site.path!r}; they must be "
                f"divisible by the group_size. {f'Use one of {fits}, or exclude' if fits else 'Exclude'} the layer "
                "(`exclude_modules`)."
            )
        n = out * 2 ** VARIANTS.index(c.variant) // 2
        return {
            "road_theta": nn.Parameter(torch.zeros(*lead, n, **site.kwargs)),
            "road_alpha": nn.Parameter(torch.ones(*lead, n, **site.kwargs)),
            "variant": c.variant,
            "group_size": c.group_size,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        if not p.settings.init_weights:
            p.road_theta.normal_(std=0.5)
            p.road_alpha.normal_(mean=1, std=0.5)

    def turn(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """c and d with its sign, (..., O): y' = c y + d (y with each pair swapped)."""
        theta, alpha = p.held("road_theta"), p.held("road_alpha")
        c1, d1, d2, c2 = pairs.parts(alpha * theta.cos(), alpha * theta.sin(), p.group_size // 2, EACH[p.variant])
        return torch.stack((c1, c2), -2).flatten(-3), torch.stack((-d1, d2), -2).flatten(-3)

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        c, d = self.turn(p)
        return (W * c[..., None] + swapped(W, -2, p.group_size) * d[..., None]).to(W.dtype)

    def bias(self, p: Adapter, b: Tensor | None) -> Tensor | None:
        c, d = self.turn(p)
        return None if b is None else (b * c + swapped(b, -1, p.group_size) * d).to(b.dtype)

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        y = inner(x)
        if inner.view.dense:
            theta, alpha = p.held("road_theta"), p.held("road_alpha")
            found = pairs.turned(y, theta, alpha, p.group_size // 2, EACH[p.variant])
            if found is not None:
                return found
        c, d = (inner.spread(t) for t in kept(p, lambda: self.turn(p)))
        other = swapped(y, -c.dim(), p.group_size)
        if y.dtype is c.dtype and other.stride() == y.stride() and not torch.is_grad_enabled() and eager():
            return other.mul_(d).addcmul_(y, c)  # which is a copy
        return (y * c + other * d).to(y.dtype)


def swapped(t: Tensor, axis: int, group: int) -> Tensor:
    """t with the halves of each group swapped along an axis that is counted from the end."""
    return t.unflatten(axis, (-1, 2, group // 2)).roll(1, axis - 1).flatten(axis - 2, axis)


class RoadLayer(BaseTunerLayer):
    """A target under RoAd adapters."""

    family = "road"
    adapter_layer_names = ("road_theta", "road_alpha")
    other_param_names = ("variant", "group_size")
    _parameter_homes = frozenset({"road_theta", "road_alpha"})


class RoadModel(BaseTuner):
    """RoAd adapters on a model."""

    prefix = "road_"
    layer_classes = name_layers(RoadLayer, globals(), packed=BNB_LAYERS)
    method: ClassVar[RoAd] = RoAd()
