"""Configurations and tuners by method, under the path that other libraries import."""

from __future__ import annotations

from . import lazy

_NAMES = {
    "peft.create": "get_peft_config inject_adapter_in_model",
    "peft.registry": """
        PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING
        PEFT_TYPE_TO_TUNER_MAPPING""",
    "peft.types": "PeftType",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
