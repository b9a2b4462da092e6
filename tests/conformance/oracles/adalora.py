"""AdaLoRA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft import AdaLoraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix


@on_matrix
def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    A, B, E = t["lora_A"], t["lora_B"], t["lora_E"]
    return W + 6 / (3 + 1e-5) * B @ (A * E)


FIELDS: dict[str, Any] = {"init_r": 3, "lora_alpha": 6, "total_step": 100}
ROWS = {"adalora": Row(AdaLoraConfig, FIELDS, weight)}
