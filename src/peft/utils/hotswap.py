"""Hot-swapping under the path that other libraries import."""

from __future__ import annotations

from .. import lazy

_NAMES = {
    "peft.hotswap": """
        CONFIG_KEYS_TO_CHECK check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict
        prepare_model_for_compiled_hotswap""",
    "peft.config": "PeftConfig",
    "peft.core.layer": "BaseTunerLayer",
    "peft.methods.lora.config": "LoraConfig",
    "peft.methods.lora.layer": "Conv2d Linear LoraLayer",
    "peft.registry": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING",
    "peft.types": "PeftType",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
