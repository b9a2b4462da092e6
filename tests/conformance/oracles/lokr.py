"""LoKr in every decomposition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft import LoKrConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix, value

ALPHA = 5


@on_matrix
def lokr(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    W1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    base = layer.get_base_layer()
    kernel = getattr(base, "kernel_size", ())
    if "lokr_w2" in t:
        W2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        a, b, core = t["lokr_w2_a"], t["lokr_w2_b"], t["lokr_t2"]
        r = len(a)
        W2 = sum(
            torch.multiply(
                torch.outer(a[u], b[v]).view(a.shape[1], b.shape[1], *[1] * len(kernel)), core[u, v].reshape(kernel)
            )
            for u in range(r)
            for v in range(r)
        )
    else:
        W2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
        if kernel:
            W2 = W2.reshape(len(W2), -1, *kernel)
    s = ALPHA / value(layer, "LoKr", "r")
    if W1.dim() == 3:
        return W + s * torch.stack([torch.kron(a, b) for a, b in zip(W1, W2, strict=True)])
    W1 = W1.view(*W1.shape, *[1] * len(kernel))
    swapped = isinstance(base, nn.Conv1d) and "lokr_w2" in t
    D = torch.kron(W2, W1) if swapped else torch.kron(W1, W2)
    return W + s * D.reshape(W.shape)


def row(r: int, few: bool = False, **more: Any) -> Row:
    return Row(LoKrConfig, {"r": r, "alpha": ALPHA, **more}, lokr, prefix="lokr_", few=few)


ROWS = {
    "lokr": row(2, few=True),
    "lokr-factors": row(1, decompose_both=True, decompose_factor=3),
    "lokr-effective": row(1, use_effective_conv2d=True, decompose_factor=2, init_weights="lycoris"),
}
