"""IA3, on the side of the output and on that of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import IA3Config
from peft.core.layer import BaseTunerLayer

from .row import Row, held, on_matrix


@on_matrix
def outputs(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    return t["ia3_l"].reshape(*W.shape[:-1], 1) * W


@on_matrix
def inputs(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    l, base = t["ia3_l"], layer.get_base_layer()
    channels = getattr(base, "in_channels", None)
    if channels is None:
        return W * l.reshape(*W.shape[:-2], 1, W.shape[-1])
    g, out, per = base.groups, W.shape[0] // base.groups, channels // base.groups
    kernel = W.shape[1] // per
    rows = [l.flatten()[i * per : (i + 1) * per].repeat_interleave(kernel) for i in range(g) for _ in range(out)]
    return W * torch.stack(rows)


def bias(layer: BaseTunerLayer, name: str, b: Tensor | None) -> Tensor | None:
    return None if b is None else b * held(layer, name)["ia3_l"].flatten()


def feedforward(**more: Any) -> dict[str, Any]:
    return {"feedforward_modules": ".*", **more}


ROWS = {
    "ia3": Row(IA3Config, {"feedforward_modules": []}, outputs, bias, prefix="ia3_"),
    "ia3-feedforward": Row(IA3Config, feedforward(), inputs, prefix="ia3_"),
}
