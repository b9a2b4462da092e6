"""Parameter-efficient fine-tuning: adapt a large model by training a small one inside it.

Every public name is imported when it is first used, so that `import peft` costs next to nothing.
"""

from __future__ import annotations

from . import lazy, registry
from .errors import (
    ChangedConfigWarning,
    LossyMergeWarning,
    MissingTensorsWarning,
    NoMatchingPeftModuleError,
    OtherBaseWarning,
    PeftError,
    PeftWarning,
    UnexpectedTensorsWarning,
    UnknownFieldWarning,
    UnmatchedTargetWarning,
    set_strict,
)
from .version import __version__ as __version__

_NAMES = {
    "peft.types": "PeftType TaskType",
    "peft.config": "PeftConfig PromptLearningConfig",
    "peft.algebra.conversion": "convert_to_lora save_as_lora",
    "peft.methods.lora.config": """
        ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig
        MontecloraConfig VeloraConfig""",
    "peft.methods.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "peft.methods.lora.loftq": "replace_lora_weights_loftq",
    "peft.methods.lora.loraga": "preprocess_loraga",
    "peft.tuners.lora.arrow": "create_arrow_model",
    "peft.methods.prompt_tuning": "PromptTuningInit",
    "peft.methods.p_tuning": "PromptEncoderReparameterizationType",
    "peft.methods.multitask_prompt_tuning": "MultitaskPromptTuningInit",
    "peft.methods.cartridge.utils": """
        compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text
        prompt_embeddings_from_past_key_values""",
    "peft.registry": """
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING
        PEFT_TYPE_TO_TUNER_MAPPING""",
    "peft.model": "PeftModel",
    "peft.heads": """
        PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering
        PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification""",
    "peft.auto": """
        AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction
        AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification
        AutoPeftModelForTokenClassification""",
    "peft.mixed_model": "PeftMixedModel",
    "peft.status": "get_layer_status get_model_status",
    "peft.create": "get_peft_config get_peft_model inject_adapter_in_model",
    "peft.core.checkpoint": """
        get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict
        set_peft_model_state_dict""",
    "peft.utils.other": "cast_mixed_precision_params prepare_model_for_kbit_training shift_tokens_right",
    "peft.utils.constants": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "peft.inspection.foresight": "plan",
    "peft.inspection.estimate": "estimate",
    "peft.core.kappa": "find_kappa_target_modules",
    "peft.core.state": "adapter_parameters",
    "peft.inspection.doctor": "doctor",
    "peft.stream": "merge_checkpoint",
}

__getattr__, __dir__, __all__ = lazy.names(__name__, registry.exports(), _NAMES)
__all__ += [
    "ChangedConfigWarning",
    "LossyMergeWarning",
    "MissingTensorsWarning",
    "NoMatchingPeftModuleError",
    "OtherBaseWarning",
    "PeftError",
    "PeftWarning",
    "UnexpectedTensorsWarning",
    "UnknownFieldWarning",
    "UnmatchedTargetWarning",
    "set_strict",
]
lazy.install()
