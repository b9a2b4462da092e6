"""GraLoRA, block by block, without and with the plain low-rank part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import GraloraConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .row import Row, on_matrix

K, R, ALPHA = 2, 4, 6


@on_matrix
def gralora(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    A, B, q = t["gralora_A"], t["gralora_B"], R // K
    rows = []
    for u in range(K):
        part = slice(u * q, (u + 1) * q)
        blocks = [(A[..., v, :, part] @ B[..., u, v * q : (v + 1) * q, :]).mT for v in range(K)]
        rows.append(torch.cat(blocks, -1))
    D = torch.cat(rows, -2)
    general = "gralora_A_general.weight" in t
    if general:
        D = D + t["gralora_B_general.weight"] @ t["gralora_A_general.weight"]
    return W + D * ALPHA / (R + 2 * general)


def odd(layout: Layout) -> str | None:
    return "gralora_k" if "separate" in layout.name else None  # the value projection has 5 in-features


def row(few: bool = True, **more: Any) -> Row:
    fields = {"r": R, "alpha": ALPHA, "gralora_k": K, **more}
    return Row(GraloraConfig, fields, gralora, forbidden=odd, prefix="gralora_", few=few)


ROWS = {"gralora": row(), "gralora-hybrid": row(few=False, hybrid_r=2)}
