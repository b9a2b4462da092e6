"""The layers of LoRA."""

from __future__ import annotations

from ... import lazy

_NAMES = {
    "peft.methods.lora.layer": """
        Conv1d Conv2d Conv3d Embedding Linear LoraLayer MultiheadAttention ParamWrapper
        _LoraParameterProxy""",
    "peft.methods.lora.config": "LoraConfig",
    "peft.core.layer": "BaseTunerLayer",
    "peft.import_utils": "is_transformers_ge_v5_4_0",
    "peft.utils.constants": "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES",
    "peft.utils.layers": "check_adapters_to_merge",
    "peft.utils.other": "transpose",
    "peft.utils.integrations": "dequantize_module_weight gather_params_ctx get_bnb_param_type",
    "peft.errors": "PeftWarning",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
