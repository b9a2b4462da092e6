"""DeLoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import DeloraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix


@on_matrix
def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    A, B, strength, w = (t[f"delora_{k}"] for k in ("A", "B", "lambda", "w_norm"))
    if W.dim() == 3:
        return torch.stack([changed(*each) for each in zip(W, A, B, strength, w, strict=True)])
    return changed(W, A, B, strength, w)


def changed(W: Tensor, A: Tensor, B: Tensor, strength: Tensor, w: Tensor) -> Tensor:
    r = len(A)
    terms = [torch.outer(B[:, k], A[k]) / (A[k].norm() * B[:, k].norm()) for k in range(r)]
    return W + strength / r * sum(terms) * w


ROWS = {"delora": Row(DeloraConfig, {"r": 3, "delora_lambda": 2}, weight, prefix="delora_")}
