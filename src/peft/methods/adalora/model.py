"""AdaLoRA's layers and tuner."""

from __future__ import annotations

from typing import ClassVar

from ...core.defaults import BNB_LAYERS
from ...core.layer import name_layers
from ...core.scale import ScaledLayer
from ..additive import AdditiveModel
from ..lora.layer import LoraLayer
from .budgets import Budgets
from .method import FACTORS, AdaLoRA


class AdaLoraLayer(ScaledLayer):
    """A target under AdaLoRA adapters."""

    family = "adalora"
    adapter_layer_names = ("lora_A", "lora_B", "lora_E")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")
    _home_order = (*LoraLayer._home_order, "lora_E")
    _parameter_homes = LoraLayer._parameter_homes | {*FACTORS}

    def natural_scaling(self, adapter: str) -> float:
        """lora_alpha, or the first rank where that is 0; the division by the rank is apart."""
        p = self.adapters[adapter]
        return float(p.lora_alpha if p.lora_alpha > 0 else p.r)


NAMES = name_layers(AdaLoraLayer, globals(), "SVD", BNB_LAYERS | {"gptq": "QuantLinear"})


class AdaLoraModel(AdditiveModel):
    """AdaLoRA adapters on a model."""

    prefix = "lora_"
    layer_classes = NAMES
    method: ClassVar[AdaLoRA] = AdaLoRA()
    companion = Budgets
