"""The base classes of tuners, and what can be done to the adapters of any model."""

from __future__ import annotations

from .. import lazy

_NAMES = {
    "peft.config": "PeftConfig",
    "peft.core.defaults": """
        DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND
        MIN_TARGET_MODULES_FOR_OPTIMIZATION SEQ_CLS_HEAD_NAMES""",
    "peft.core.handmade": "BaseTunerLayer",
    "peft.core.tuner": "BaseTuner",
    "peft.core.wrappers": "AuxiliaryTrainingWrapper",
    "peft.errors": "NoMatchingPeftModuleError PeftWarning",
    "peft.functional": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
    "peft.import_utils": "is_transformers_ge_v5",
    "peft.registry": "PEFT_TYPE_TO_PREFIX_MAPPING",
    "peft.types": "PeftType TaskType",
    "peft.utils.constants": "UPCAST_DTYPES",
    "peft.utils.integrations": "init_empty_weights",
    "peft.utils.other": "match_target_against_key",
    "peft.utils.quantization_utils": """
        QuantizationBackend get_quantization_kwargs quantization_extra_repr resolve_quantization_backend""",
    "peft.utils.layers": """
        check_adapters_to_merge clone_module find_parameter_name_by_module get_device_map replicate_layers""",
    "peft.core.onload": "onload_layer",
    "peft.core.targets": "check_target_module_exists inspect_matched_modules",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
