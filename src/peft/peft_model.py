"""The wrappers of models, under the path that other libraries import."""

from __future__ import annotations

from . import lazy

_NAMES = {
    "peft.model": "PeftModel",
    "peft.heads": """
        PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM
        PeftModelForSequenceClassification PeftModelForTokenClassification""",
    "peft.status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    "peft.config": "PeftConfig",
    "peft.core.checkpoint": "get_peft_model_state_dict load_peft_weights set_peft_model_state_dict",
    "peft.core.defaults": "DUMMY_MODEL_CONFIG SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME",
    "peft.core.layer": "BaseTunerLayer",
    "peft.core.tuner": "BaseTuner",
    "peft.core.tokens": "TrainableTokensWrapper",
    "peft.core.wrappers": "AuxiliaryTrainingWrapper",
    "peft.registry": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING",
    "peft.types": "PeftType TaskType",
    "peft.utils.constants": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "peft.utils.integrations": "init_empty_weights",
    "peft.utils.other": "id_tensor_storage infer_device shift_tokens_right",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
