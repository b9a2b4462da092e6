"""BOFT with one factor and with two."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import BOFTConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .row import Row, eye, on_matrix


def order(n: int, b: int, k: int) -> list[int]:
    """Where factor k takes its features from."""
    if k == 0:
        return list(range(n))
    found = []
    for start in range(0, n, b * 2**k):
        halves = [list(range(i, i + b // 2)) for i in range(start, start + b * 2**k, b // 2)]
        found += [i for half in halves[::2] + halves[1::2] for i in half]
    return found


def turn(M: Tensor) -> Tensor:
    """R, (n, n), from (factors, blocks, b, b)."""
    b, n = M.shape[-1], M.shape[1] * M.shape[-1]
    R = eye(n, M)
    for k, factor in enumerate(M):
        blocks = []
        for m in factor:
            Q = (m - m.T) / 2
            blocks.append((eye(b, m) - Q) @ torch.linalg.inv(eye(b, m) + Q))
        P = eye(n, M)[order(n, b, k)]
        R = P @ torch.block_diag(*blocks) @ P.T @ R
    return R


@on_matrix
def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    M, s = t["boft_R"], t["boft_s"]
    if M.dim() == 5:
        return torch.stack([f * (w @ turn(m).T) for w, m, f in zip(W, M, s, strict=True)])
    on_output = "embedding" in type(layer.get_base_layer()).__name__.lower()
    return s.reshape(-1, 1) * (turn(M).T @ W if on_output else W @ turn(M).T)


def uneven(layout: Layout) -> str | None:
    """Two factors need an even number of blocks."""
    odd = layout.kind in ("linear", "embedding", "parameter") or layout.grouped or "separate" in layout.name
    return "boft_n_butterfly_factor=2" if odd else None


ROWS = {
    "boft": Row(
        BOFTConfig,
        {"boft_block_size": 2},
        weight,
        prefix="boft_",
        changes={
            "linear": {"boft_block_size": 3},
            "attention": {"boft_block_size": 0, "boft_block_num": 1},
        },
    ),
    "boft-butterfly": Row(
        BOFTConfig,
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        weight,
        forbidden=uneven,
        prefix="boft_",
        few=False,
        changes={},
    ),
}
