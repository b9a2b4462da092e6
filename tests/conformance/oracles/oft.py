"""OFT: exact and as a series, constrained, with one block for all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peft import OFTConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, eye, on_matrix, value


def skew(v: Tensor, b: int) -> Tensor:
    """A skew matrix from its numbers above the diagonal, row by row."""
    rows, k = [], 0
    for i in range(b):
        rows.append([v.new_zeros(())] * (i + 1) + list(v[k : k + b - 1 - i]))
        k += b - 1 - i
    U = torch.stack([torch.stack(row) for row in rows])
    return U - U.mT


def exact(Q: Tensor) -> Tensor:
    return (eye(len(Q), Q) - Q) @ torch.linalg.inv(eye(len(Q), Q) + Q)


def neumann(Q: Tensor) -> Tensor:
    """Five terms."""
    return eye(len(Q), Q) + 2 * (Q + Q @ Q + Q @ Q @ Q) + Q @ Q @ Q @ Q


def rotations(kind: Any, limit: float | None) -> Any:
    def rotation(vectors: Tensor, n: int, count: int) -> Tensor:
        """R, (n, n), of (blocks, numbers); `count` blocks of the stored ones."""
        b = n // count
        blocks = []
        for v in vectors:
            if limit is not None:
                size = skew(v.detach(), b).norm().item()
                bound = limit / math.sqrt(len(vectors))
                v = v - v.detach() + v.detach() * min(1.0, bound / size) if size else v
            blocks.append(kind(skew(v, b)))
        blocks = blocks * count if len(blocks) == 1 else blocks
        return torch.block_diag(*blocks)

    @on_matrix
    def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
        (name, v), n_blocks = next(iter(t.items())), value(layer, "OFT", "r")
        if "embedding" in name:
            return rotation(v, W.shape[0], n_blocks).mT @ W
        g = getattr(layer.get_base_layer(), "groups", 1)
        if v.dim() == 3:
            return torch.stack([w @ rotation(u, w.shape[1], n_blocks).mT for w, u in zip(W, v, strict=True)])
        R = rotation(v, W.shape[1] * g, n_blocks)
        width, out = W.shape[1], W.shape[0] // g
        return torch.cat(
            [
                W[i * out : (i + 1) * out] @ R[i * width : (i + 1) * width, i * width : (i + 1) * width].mT
                for i in range(g)
            ]
        )

    return weight


def row(kind: Any, limit: float | None = None, **more: Any) -> Row:
    few = more.pop("few", False)
    whole = {"r": 1, "oft_block_size": 0}
    changes = {
        "linear": {"oft_block_size": 3},
        "embedding": {"oft_block_size": 3},
        "attention": whole,
        "parameter": {"r": 2, "oft_block_size": 0},
    }
    fields = {"oft_block_size": 2, **more}
    return Row(OFTConfig, fields, rotations(kind, limit), prefix="oft_", few=few, changes=changes)


ROWS = {
    "oft": row(exact, use_cayley_neumann=False, few=True),
    "oft-series": row(neumann),
    "oft-constrained": row(exact, 0.5, use_cayley_neumann=False, coft=True, eps=0.5),
    "oft-shared": row(neumann, block_share=True),
}
