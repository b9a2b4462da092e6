"""TinyLoRA: the numbers of each layer, and of all layers together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft import TinyLoraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix


def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    p = layer.adapters[name]
    v = getattr(p, p.vector).double()

    @on_matrix
    def changed(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
        P = p.tinylora_P.double()
        R = sum((v[k] * P[k] for k in range(len(v))), torch.zeros_like(P[0]))
        turned = isinstance(layer.get_base_layer(), nn.Embedding)
        D = t["tinylora_B"] @ R @ t["tinylora_A"]
        return M + (D.mT if turned else D)

    return changed(layer, name, W, original)


def row(**more: Any) -> Row:
    few = more.pop("few", False)
    fields = {"r": 3, "u": 4, "init_weights": "uniform", "init_v_bound": 1.0, **more}  # no layer's training moves v
    return Row(TinyLoraConfig, fields, weight, prefix="tinylora_", identity=False, few=few)


ROWS = {"tinylora": row(few=True), "tinylora-tied": row(weight_tying=1.0)}
