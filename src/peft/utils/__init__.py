"""Helpers under the names that other libraries import."""

from __future__ import annotations

from .. import lazy
from .constants import TARGET_NAMES

_NAMES = {
    "peft.core.checkpoint": """
        get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict
        set_peft_model_state_dict""",
    "peft.core.tokens": "TrainableTokensWrapper",
    "peft.core.wrappers": "AuxiliaryTrainingWrapper ModulesToSaveWrapper",
    "peft.errors": "NoMatchingPeftModuleError PeftError PeftWarning",
    "peft.methods.lora.loftq": "replace_lora_weights_loftq",
    "peft.registry": "register_peft_method",
    "peft.types": "PeftType TaskType",
    "peft.utils.constants": """
        ALLOWED_COMPUTE_DTYPES CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME
        UPCAST_DTYPES TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING WEIGHTS_NAME """
    + " ".join(TARGET_NAMES),
    "peft.utils.quantization_utils": """
        get_quantization_config get_quantization_kwargs quantization_extra_repr resolve_quantization_backend""",
    "peft.utils.other": """
        _freeze_adapter _get_batch_size _get_input_embeddings_name _get_submodules _is_valid_match
        _set_adapter cast_mixed_precision_params id_tensor_storage infer_device
        prepare_model_for_kbit_training shift_tokens_right transpose""",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
