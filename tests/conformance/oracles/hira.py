"""HiRA."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import HiraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, by_input, held


def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    A, B = (next(v for k, v in held(layer, name).items() if k.endswith(e)) for e in "AB")
    if A.dim() == B.dim() == W.dim() and A.shape[2:] == W.shape[2:] and B.shape[-1] == 1:  # a convolution
        return W + original * torch.einsum("or,rc...->oc...", B.flatten(1), A)
    product = B @ A
    return W + original * (product.mT if by_input(layer) else product)


ROWS = {"hira": Row(HiraConfig, {"r": 3}, weight, prefix="hira_", noise=0.6)}
