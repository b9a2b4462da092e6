"""DEFT, with each way from P to its subspace, and without R."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import DeftConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, by_input, held


def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    t, conv = held(layer, name), type(layer.get_base_layer()).__name__ in ("Conv1d", "Conv2d", "Conv3d")
    base = original.mT if by_input(layer) else original.flatten(1) if conv else original
    P = t["deft_P"]
    if layer.deft_decomposition[name] == "qr":
        Q = project = torch.linalg.qr(P)[0]
    else:
        Q, project = P, P.clamp_min(0)
    inside = -project.mT @ base
    if "deft_R" in t:
        inside = inside + t["deft_R"] * 5 / 3
    update = Q @ inside
    return W + (update.mT if by_input(layer) else update.reshape(W.shape))


FIELDS = {"r": 3, "alpha": 5}
ROWS = {
    "deft": Row(DeftConfig, FIELDS, weight, prefix="deft_"),
    "deft-qr": Row(DeftConfig, {**FIELDS, "decomposition_method": "qr"}, weight, prefix="deft_", few=False),
    "deft-para": Row(DeftConfig, {**FIELDS, "para": True}, weight, prefix="deft_", few=False, identity=False),
}
