"""Adapters of different methods in one model: a later release. The class is here for `isinstance`."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import lazy

_NAMES = {
    "peft.config": "PeftConfig",
    "peft.core.defaults": "DUMMY_MODEL_CONFIG",
    "peft.model": "PeftModel",
    "peft.registry": "PEFT_TYPE_TO_CONFIG_MAPPING",
}
__getattr__, __dir__, _ = lazy.names(__name__, _NAMES)


class PeftMixedModel(nn.Module):
    """A model whose adapters may differ in method. No instance can be made yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "PeftMixedModel comes with a later release. Use get_peft_model with adapters of one method."
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PeftMixedModel:
        """Raises NotImplementedError."""
        return cls()
