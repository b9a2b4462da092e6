"""LoRA under the path that other libraries import."""

from __future__ import annotations

from ... import lazy

_NAMES = {
    "peft.algebra.conversion": "convert_to_lora save_as_lora",
    "peft.methods.lora.config": """
        ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig
        MontecloraConfig VeloraConfig""",
    "peft.methods.lora.layer": """
        Conv1d Conv2d Conv3d Embedding GPTQLoraLinear Linear LoraLayer MultiheadAttention ParamWrapper""",
    "peft.methods.lora.model": "LoraModel",
    "peft.methods.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "peft.methods.lora.loraga": "preprocess_loraga",
    "peft.tuners.lora.arrow": "create_arrow_model",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
