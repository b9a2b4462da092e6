"""Adapters of different methods in one model, by the class that other libraries know for it."""

from __future__ import annotations

from collections.abc import Sequence

from . import lazy
from .errors import check_adapters
from .model import PeftModel

_NAMES = {
    "peft.config": "PeftConfig",
    "peft.core.defaults": "DUMMY_MODEL_CONFIG",
    "peft.registry": "PEFT_TYPE_TO_CONFIG_MAPPING",
}
__getattr__, __dir__, _ = lazy.names(__name__, _NAMES)


class PeftMixedModel(PeftModel):
    """A PeftModel whose adapters are switched several at a time."""

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active, in this order; they become trainable unless `inference_mode`."""
        check_adapters((adapter_name,) if isinstance(adapter_name, str) else adapter_name, self.peft_config)
        self._tuner.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove adapters; nothing is removed if one of the names is unknown."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        check_adapters(names, self.peft_config)
        for name in names:
            super().delete_adapter(name)
