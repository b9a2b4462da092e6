"""MiSS in its three forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import MissConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .row import Row, on_matrix


@on_matrix
def miss(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    D = t["miss_block"]
    r, width = D.shape[-2:]
    columns = torch.stack([D[..., i % width] for i in range(W.shape[-2])], -1)  # (..., r, out)
    return W + torch.stack([columns[..., j % r, :] for j in range(W.shape[-1])], -1)


@on_matrix
def bat(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    D = t["miss_block"]
    r = D.shape[-1]
    rows = []
    for u in range(W.shape[-2] // r):
        parts = []
        for v in range(W.shape[-1] // r):
            part = W[..., u * r : (u + 1) * r, v * r : (v + 1) * r]
            parts.append(part + part @ D[..., u, :, :] + D[..., u, :, :])
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, -2)


def odd(layout: Layout) -> str | None:
    return "r=2 must divide" if "separate" in layout.name else None  # the value projection has 5 in-features


def row(r: int, weight: Any, few: bool = True, forbidden: Any = lambda layout: None, **more: Any) -> Row:
    return Row(MissConfig, {"r": r, **more}, weight, forbidden=forbidden, prefix="miss_", few=few)


ROWS = {
    "miss": row(4, miss),
    "miss-mini": row(3, miss, few=False, init_weights="mini", mini_r=2),
    "miss-bat": row(2, bat, forbidden=odd, init_weights="bat"),
}
