"""Uni-LoRA: the factors read number by number."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import UniLoraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix

LENGTH = 12


def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    p = layer.adapters[name]
    theta, often = p.unilora_theta_d.double(), p.unilora_factor.double() ** -2
    A, B = (
        torch.stack([theta[i] / often[i] ** 0.5 for i in at.flatten().tolist()]).view(at.shape)
        for at in (p.unilora_indices_A, p.unilora_indices_B)
    )

    @on_matrix
    def changed(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
        return M + B @ A

    return changed(layer, name, W, original)


FIELDS = {"r": 3, "theta_d_length": LENGTH, "init_theta_d_bound": 0.5}
ROWS = {"unilora": Row(UniLoraConfig, FIELDS, weight, prefix="unilora_", identity=False, few=False)}
