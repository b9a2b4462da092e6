"""C3A: circulant blocks, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import C3AConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .row import Row, on_matrix


@on_matrix
def c3a(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    K, b = t["c3a_kernel"], 2
    out, inp = W.shape[-2:]
    rows = [
        torch.stack([K[..., i // b, j // b, (j % b - i % b) % b] for j in range(inp)], -1) / inp for i in range(out)
    ]
    return W + torch.stack(rows, -2)


def odd(layout: Layout) -> str | None:
    return "block_size" if "separate" in layout.name else None  # the value projection has 5 in-features


FIELDS = {"block_size": 2, "init_weights": True}
ROWS = {"c3a": Row(C3AConfig, FIELDS, c3a, forbidden=odd, prefix="c3a_", noise=4.0)}
