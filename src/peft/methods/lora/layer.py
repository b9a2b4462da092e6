"""The names under which LoRA's layers are printed and recognised: one class per layout, each the core's layer."""

from __future__ import annotations

import math
from typing import Any

from ...core.layer import BaseTunerLayer, name_layers


class LoraLayer(BaseTunerLayer):
    """A target under LoRA adapters; `isinstance(module, LoraLayer)` tells such layers from others."""

    family = "lora"
    adapter_layer_names = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
    _home_order = (
        "lora_dropout",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    _parameter_homes = frozenset({"lora_embedding_A", "lora_embedding_B"})

    def _alpha_over_r(self, adapter: str) -> float:
        p = self.adapters[adapter]
        return p.lora_alpha / (math.sqrt(p.r) if p.use_rslora else p.r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the scaling `scale` times alpha / r; adapters that the layer lacks are ignored."""
        if adapter in self.adapters:
            self._rescale(adapter, scale * self._alpha_over_r(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        if scale != 1:
            for name in self.active_adapters:
                if name in self.adapters:
                    self._rescale(name, self.adapters[name].scaling * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`; None gives back alpha / r."""
        for name in self.active_adapters:
            if name in self.adapters:
                p = self.adapters[name]
                self._rescale(name, self._alpha_over_r(name) if scale is None else p.scaling / scale)

    def _rescale(self, name: str, value: Any) -> None:
        p: Any = self.adapters[name]
        if hasattr(p.scaling, "fill_"):
            p.scaling.fill_(float(value))
        else:
            p.scaling = value

    @property
    def lora_variant(self) -> dict[str, Any]:
        """The methods of those adapters that are more than plain LoRA."""
        return {n: a.method for n, a in self.adapters.items() if getattr(a, "use_dora", False)}


NAMES = name_layers(LoraLayer, globals())

__all__ = ["NAMES", "LoraLayer", *NAMES]
