"""`get_peft_model` under the path that other libraries import."""

from __future__ import annotations

from . import lazy

_NAMES = {
    "peft.create": "get_peft_model",
    "peft.config": "PeftConfig PromptLearningConfig",
    "peft.core.layer": "BaseTunerLayer",
    "peft.core.tuner": "BaseTuner",
    "peft.mixed_model": "PeftMixedModel",
    "peft.model": "PeftModel",
    "peft.registry": """
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING""",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
