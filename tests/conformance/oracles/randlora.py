"""RandLoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import RandLoraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix


@on_matrix
def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    shared = next(p.shared for p in layer.adapters.values() if "randlora_A" in p.shared)
    A, B = (next(iter(shared[k]._buffers.values())).double() for k in ("randlora_A", "randlora_B"))
    scale, gains = t["randlora_lambda"], t["randlora_gamma"]
    if W.dim() == 3:
        return torch.stack([changed(*each, A, B) for each in zip(W, scale, gains, strict=True)])
    return changed(W, scale, gains, A, B)


def changed(W: Tensor, scale: Tensor, gains: Tensor, A: Tensor, B: Tensor) -> Tensor:
    r, n = scale.shape
    m, large = min(W.shape), max(W.shape)
    D = torch.zeros(large, m, dtype=W.dtype)
    for c in range(r * n):
        row = scale[c // n, c % n] * A[c // n, 0, :m] * gains[c % n]
        D = D + torch.outer(B[:large, c // r, c % r], row)
    return W + 6 / 4 * (D if W.shape[0] >= W.shape[1] else D.T)


ROWS = {"randlora": Row(RandLoraConfig, {"r": 4, "randlora_alpha": 6}, weight, prefix="randlora_", noise=0.1)}
