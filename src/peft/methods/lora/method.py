"""LoRA: a low-rank update of a frozen weight.

    W' = W + s B A,   A (r, in), B (out, r),   s = alpha / r,  or alpha / sqrt(r) with rank-stabilised scaling

A starts random and B at zero, so training starts at the base model. Sources: Hu et al. 2021, arXiv 2106.09685, eq. 3;
rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732. Initialisations that the literature writes into the base
weight (PiSSA, OLoRA) keep the base here: with the first factors A0, B0 held aside, W' = W + s (B A - B0 A0).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.method import LowRank, Method, Site
from ...core.stack import Adapter, Stack
from . import init as starts


class LoRA(LowRank):
    """W' = W + s B A."""

    def build(self, site: Site) -> dict[str, Any]:
        c, m, view = site.settings, site.module, site.view
        bias = bool(c.lora_bias)
        root = math.sqrt(c.r) if c.use_rslora else c.r
        return {
            "lora_dropout": nn.Dropout(c.lora_dropout) if c.lora_dropout else nn.Identity(),
            f"lora_{view.infix}A": view.down(m, c.r, **site.kwargs),
            f"lora_{view.infix}B": view.up(m, c.r, bias, **site.kwargs),
            "r": c.r,
            "lora_alpha": c.lora_alpha,
            "scaling": c.lora_alpha / root,
            "use_rslora": c.use_rslora,
            "use_dora": c.use_dora,
            "lora_bias": bias,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        starts.fill(self, p, inner)

    def derive(self, p: Adapter, inner: Stack) -> None:
        """A0, B0 of an initialisation that the literature subtracts from the base weight."""
        pair = starts.residual(p, inner)
        if pair is not None:
            A0, B0 = pair
            p.layer.keep(p, "lora_residual_A", A0)
            p.layer.keep(p, "lora_residual_B", B0)

    def own_factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """(A, B) as trained and saved."""
        view, m = p.layer.view, p.layer.get_base_layer()
        if view.infix:
            return view.A(m, p.held("lora_embedding_A")), view.B(m, p.held("lora_embedding_B"))
        A, B = p.held("lora_A"), p.held("lora_B")
        if view.dense:
            return A.weight, B.weight
        return view.A(m, A.weight), view.B(m, B.weight)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        A, B = self.own_factors(p)
        if "lora_residual_A" not in p.layer._modules or not p.has("lora_residual_A"):
            return A, B
        A0, B0 = p.held_buffer("lora_residual_A"), p.held_buffer("lora_residual_B")
        return torch.cat([A, A0.to(A.dtype)], -2), torch.cat([B, -B0.to(B.dtype)], -1)

    def scaling(self, p: Adapter) -> Any:
        return p.scaling

    def up_bias(self, p: Adapter) -> Tensor | None:
        return p.held("lora_B").bias if p.__dict__["lora_bias"] else None

    def drop_rate(self, p: Adapter) -> float:
        drop = p.held("lora_dropout")
        return drop.p if drop.training and type(drop) is not nn.Identity else 0.0

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if inner.view.dense and (_hooked(p) or not p.layer.cast_input_dtype_enabled):
            return self.through_modules(p, y, x)
        return super().onto(p, inner, y, x)

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        if inner.view.dense and (_hooked(p) or not p.layer.cast_input_dtype_enabled):
            return self.through_modules(p, inner(x), x)
        return super().forward(p, inner, x)

    def through_modules(self, p: Adapter, y: Tensor, x: Tensor) -> Tensor:
        """The same, by calling the modules: they may be wrapped, offloaded or hooked."""
        A, B = p.held("lora_A"), p.held("lora_B")
        if p.layer.cast_input_dtype_enabled:
            weight = getattr(A, "weight", x)
            x = x.to(weight.dtype) if weight.is_floating_point() else x
        return (y + B(A(F.dropout(x, self.drop_rate(p)))) * p.scaling).to(y.dtype)


class OutProjection(LoRA):
    """LoRA on the out-projection of a targeted nn.MultiheadAttention: W' = W + 2 s B A.

    The peer adds this update twice, in its forward and in its merge alike, the second time as a constant of the
    gradient; adapter files are trained for it.
    """

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        update = super().delta(p, W, rows)
        return update + update.detach()

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        return Method.forward(self, p, inner, x)


def _hooked(p: Adapter) -> bool:
    """Whether lora_A or lora_B is more than its weight: wrapped, offloaded, hooked or patched."""
    if torch.compiler.is_compiling():
        return False
    modules, name = p.layer._modules, p.name
    for home in (modules["lora_A"], modules["lora_B"]):
        found = home._modules[name]  # type: ignore[union-attr]
        d = found.__dict__
        if type(found) is not nn.Linear or d["_forward_pre_hooks"] or d["_forward_hooks"] or "forward" in d:
            return True
    return False
