"""SHiRA: values at places that are saved."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import ShiraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix


@on_matrix
def shira(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    row, column = t["shira_indices"].long()
    one_hot = torch.zeros(len(row), *W.shape[-2:], dtype=W.dtype)
    one_hot[torch.arange(len(row)), row, column] = 1
    return W + torch.einsum("...n,noi->...oi", t["shira_weight"], one_hot)


ROWS = {"shira": Row(ShiraConfig, {"r": 2, "random_seed": 4}, shira, prefix="shira_", noise=0.6)}
