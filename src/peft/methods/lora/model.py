"""The LoRA tuner."""

from __future__ import annotations

from typing import Any

from ...core.layer import tuner_layers
from ...core.method import Method
from ...core.tuner import BaseTuner
from ..additive import under_dora
from . import corda, loraga
from .calibration import at
from .layer import NAMES
from .loftq import LoftQ
from .method import LoRA, OutProjection

_PLAIN, _LOFTQ, _OUT = LoRA(), LoftQ(), OutProjection()


class LoraModel(BaseTuner):
    """LoRA adapters on a model.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    prefix = "lora_"
    layer_classes = NAMES

    @classmethod
    def method_of(cls, settings: Any) -> Method:
        method = _LOFTQ if settings.init_lora_weights == "loftq" else _PLAIN
        return under_dora(method) if settings.use_dora else method

    @classmethod
    def out_projection_method_of(cls, settings: Any) -> Method:
        plain = cls.method_of(settings)
        return _OUT if plain is _PLAIN else plain

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._forget(adapter_name)

    def _forget(self, name: str) -> None:
        """Delete what was measured for the adapter's first values, once all of them are made."""
        options = self.peft_config[name].corda_config if hasattr(self.peft_config[name], "corda_config") else None
        if options is not None and not options.prune_temporary_fields:
            return
        for _, layer in tuner_layers(self.model):
            p = getattr(layer, "adapters", {}).get(name)
            if p is not None and getattr(p, "subtracts", False) and p.has("lora_residual_A"):
                for measured in (corda.NAME, loraga.NAME):
                    at(p).drop(measured)
