"""GraLoRA: a low-rank update for each of k x k blocks of the weight.

    W' = W + s D,   block (u, v) of D is (A_v[:, u] B_u[v])',   s = alpha / (r + hybrid_r)

A (k, in / k, r) and B (k, r, out / k) are cut along r into k parts of r / k, one for each block. `hybrid_r` adds a
plain low-rank product s Bg Ag. B starts at zero, so training starts at the base model. Source: Jung et al. 2025,
arXiv 2505.20355.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import describe
from ..core import draw
from ..core.direct import open_linear
from ..core.layer import name_layers
from ..core.method import Delta, Site
from ..core.scale import ScaledLayer
from ..core.stack import Adapter, Stack
from ..core.views import linear_module
from ..kernels.modes import changed
from ..target_config import Alpha, OrAuto, divisor, probability
from .additive import AdditiveConfig, AdditiveModel


@dataclass
class GraloraConfig(Alpha, AdditiveConfig):
    """The configuration of GraLoRA."""

    kind, rank_beside = "GRALORA", "hybrid_r"
    added = frozenset({"exclude_modules"})
    ranks = ("r", "gralora_k")
    r: int = field(default=32, metadata=describe("Rank; gralora_k divides it."))
    hybrid_r: int = field(default=0, metadata=describe("Rank of the plain low-rank update beside the blocks."))
    alpha: OrAuto = field(default=64, metadata=describe("Scaling: alpha / (r + hybrid_r). 'auto': 2 (r + hybrid_r)."))
    gralora_dropout: float = field(default=0.0, metadata=describe("Dropout of the adapter's input."))
    gralora_k: int = field(default=2, metadata=describe("Blocks per side; it divides in and out."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else all at random."))

    def check(self) -> None:
        """Numbers."""
        probability("gralora_dropout", self.gralora_dropout)
        if self.hybrid_r < 0:
            raise ValueError(f"`hybrid_r` must not be negative; got {self.hybrid_r}. Use 0 for none.")
        if self.r % self.gralora_k:
            raise ValueError(
                f"r should be divisible by gralora_k, but got r={self.r} and gralora_k={self.gralora_k}. Use "
                f"r={max(1, round(self.r / self.gralora_k)) * self.gralora_k}."
            )


class GraLoRA(Delta):
    """W' = W + s D with low-rank blocks."""

    dropout = "gralora_dropout"

    def build(self, site: Site) -> dict[str, Any]:
        c, k = site.settings, site.settings.gralora_k
        *lead, out, inp = site.view.shape(site.module)
        divisor("gralora_k", k, (inp, out), site.path, ", for this layer alone with module_config")
        down, up = general(site, lead, out, inp) if c.hybrid_r else (nn.Identity(), nn.Identity())
        return {
            "gralora_dropout": site.dropout("gralora_dropout"),
            "gralora_A": nn.Parameter(torch.empty(*lead, k, inp // k, c.r, **site.kwargs)),
            "gralora_B": nn.Parameter(torch.empty(*lead, k, c.r, out // k, **site.kwargs)),
            "gralora_A_general": down,
            "gralora_B_general": up,
            "r": c.r,
            "hybrid_r": c.hybrid_r,
            "alpha": c.alpha,
            "scaling": c.alpha / (c.r + c.hybrid_r),
            "gralora_k": k,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        downs = [p.gralora_A.mT, *([p.gralora_A_general.weight] if p.hybrid_r else [])]
        ups = [p.gralora_B.mT, *([p.gralora_B_general.weight] if p.hybrid_r else [])]
        for t in downs:
            draw.kaiming(t)
        for t in ups:
            t.zero_() if p.settings.init_weights else draw.kaiming(t)

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        A, B, k = p.held("gralora_A"), p.held("gralora_B"), p.gralora_k
        height = B.shape[-1]
        start, stop, _ = rows.indices(k * height)
        first, last = start // height, -(-stop // height)
        A = A.unflatten(-1, (k, -1))[..., first:last, :]  # (..., v, in, u, q)
        B = B[..., first:last, :, :].unflatten(-2, (k, -1))  # (..., u, v, q, out)
        D = torch.einsum("...viuq,...uvqo->...uovi", A, B).flatten(-2).flatten(-3, -2)
        D = D[..., start - first * height : stop - first * height, :]
        if p.hybrid_r:
            D = D + p.held("gralora_B_general").weight[..., rows, :] @ p.held("gralora_A_general").weight
        return D * p.scaling

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held = open_linear(inner, x) if type(self).onto is GraLoRA.onto else None
        alike = held is not None and p.held("gralora_A").dtype is x.dtype
        return changed(F.linear(x, *held), "add", self.update(p, inner, x)) if held is not None and alike else None

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if not inner.view.dense:
            return super().onto(p, inner, y, x)
        return (y + self.update(p, inner, x)).to(y.dtype)

    def update(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        """s D x, block by block: batched products of parts of features would be copied there and back."""
        A, B, k = p.held("gralora_A"), p.held("gralora_B"), p.gralora_k
        rate = self.drop_rate(p)
        dropped, _ = inner.drop(x, rate, A.dtype)
        h = torch.cat([part @ a for part, a in zip(dropped.chunk(k, -1), A.unbind(), strict=True)], -1) * p.scaling
        parts = h.unflatten(-1, (k, k, -1)).transpose(-3, -2).flatten(-2).unbind(-2)  # (..., r) for each u
        found = torch.cat([part @ b for part, b in zip(parts, B.unbind(), strict=True)], -1)
        if p.hybrid_r:
            dropped, _ = inner.drop(x, rate, A.dtype)
            down = F.linear(dropped, p.held("gralora_A_general").weight) * p.scaling
            found = found + F.linear(down, p.held("gralora_B_general").weight)
        return found


def general(site: Site, lead: list[int], out: int, inp: int) -> tuple[nn.Linear, nn.Linear]:
    """Holders of Ag and Bg."""
    r = site.settings.hybrid_r
    down, up = linear_module(inp, r, **site.kwargs), linear_module(r, out, **site.kwargs)
    if lead:
        down.weight = nn.Parameter(torch.empty(*lead, r, inp, **site.kwargs))
        up.weight = nn.Parameter(torch.empty(*lead, out, r, **site.kwargs))
    return down, up


class GraloraLayer(ScaledLayer):
    """A target under GraLoRA adapters."""

    family, _sized = "gralora", True
    adapter_layer_names = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
    other_param_names = ("r", "hybrid_r", "alpha", "scaling", "gralora_dropout", "gralora_k")
    _home_order = ("gralora_dropout", "gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
    _parameter_homes = frozenset({"gralora_A", "gralora_B"})

    def natural_scaling(self, adapter: str) -> float:
        """alpha / (r + hybrid_r)."""
        p = self.adapters[adapter]
        return p.alpha / (p.r + p.hybrid_r)


class GraloraModel(AdditiveModel):
    """GraLoRA adapters on a model."""

    prefix = "gralora_"
    layer_classes = name_layers(GraloraLayer, globals())
    method: ClassVar[GraLoRA] = GraLoRA()
