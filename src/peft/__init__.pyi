"""The public names for editors and type checkers; `__init__.py` imports them when they are used."""

from .algebra.conversion import (
    convert_to_lora,
    save_as_lora,
)
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .config import (
    PeftConfig,
    PromptLearningConfig,
)
from .core.checkpoint import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from .core.kappa import (
    find_kappa_target_modules,
)
from .core.state import (
    adapter_parameters,
)
from .create import (
    get_peft_config,
    get_peft_model,
    inject_adapter_in_model,
)
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
from .heads import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .inspection.doctor import (
    doctor,
)
from .inspection.estimate import (
    estimate,
)
from .inspection.foresight import (
    plan,
)
from .methods.adalora.config import (
    AdaLoraConfig,
)
from .methods.adalora.model import (
    AdaLoraModel,
)
from .methods.adamss.config import (
    AdamssConfig,
)
from .methods.adamss.model import (
    AdamssModel,
)
from .methods.adaption_prompt.config import (
    AdaptionPromptConfig,
)
from .methods.adaption_prompt.model import (
    AdaptionPromptModel,
)
from .methods.beft import (
    BeftConfig,
    BeftModel,
)
from .methods.boft import (
    BOFTConfig,
    BOFTModel,
)
from .methods.c3a import (
    C3AConfig,
    C3AModel,
)
from .methods.cartridge.config import (
    CartridgeConfig,
)
from .methods.cartridge.model import (
    CartridgeEncoder,
)
from .methods.cartridge.utils import (
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from .methods.cpt import (
    CPTConfig,
    CPTEmbedding,
)
from .methods.deft import (
    DeftConfig,
    DeftModel,
)
from .methods.delora import (
    DeloraConfig,
    DeloraModel,
)
from .methods.fourierft import (
    FourierFTConfig,
    FourierFTModel,
)
from .methods.frod.config import (
    FrodConfig,
)
from .methods.frod.model import (
    FrodModel,
)
from .methods.glora import (
    GloraConfig,
    GloraModel,
)
from .methods.gralora import (
    GraloraConfig,
    GraloraModel,
)
from .methods.hira import (
    HiraConfig,
    HiraModel,
)
from .methods.hra import (
    HRAConfig,
    HRAModel,
)
from .methods.ia3 import (
    IA3Config,
    IA3Model,
)
from .methods.lily import (
    LilyConfig,
    LilyModel,
)
from .methods.ln_tuning import (
    LNTuningConfig,
    LNTuningModel,
)
from .methods.loha import (
    LoHaConfig,
    LoHaModel,
)
from .methods.lokr import (
    LoKrConfig,
    LoKrModel,
)
from .methods.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from .methods.lora.eva import (
    get_eva_state_dict,
    initialize_lora_eva_weights,
)
from .methods.lora.loftq import (
    replace_lora_weights_loftq,
)
from .methods.lora.loraga import (
    preprocess_loraga,
)
from .methods.lora.model import (
    LoraModel,
)
from .methods.miss import (
    MissConfig,
    MissModel,
)
from .methods.multitask_prompt_tuning import (
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from .methods.oft import (
    OFTConfig,
    OFTModel,
)
from .methods.osf import (
    OSFConfig,
    OSFModel,
)
from .methods.p_tuning import (
    PromptEncoder,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
)
from .methods.peanut import (
    PeanutConfig,
    PeanutModel,
)
from .methods.poly import (
    PolyConfig,
    PolyModel,
)
from .methods.prefix_tuning import (
    PrefixEncoder,
    PrefixTuningConfig,
)
from .methods.prompt_tuning import (
    PromptEmbedding,
    PromptTuningConfig,
    PromptTuningInit,
)
from .methods.psoft import (
    PsoftConfig,
    PsoftModel,
)
from .methods.pvera import (
    PveraConfig,
    PveraModel,
)
from .methods.randlora import (
    RandLoraConfig,
    RandLoraModel,
)
from .methods.road import (
    RoadConfig,
    RoadModel,
)
from .methods.shadow.config import (
    ShadowConfig,
)
from .methods.shadow.model import (
    ShadowModel,
)
from .methods.shira import (
    ShiraConfig,
    ShiraModel,
)
from .methods.supertuning import (
    SupertuningConfig,
    SupertuningModel,
)
from .methods.tinylora import (
    TinyLoraConfig,
    TinyLoraModel,
)
from .methods.trainable_tokens import (
    TrainableTokensConfig,
    TrainableTokensModel,
)
from .methods.unilora import (
    UniLoraConfig,
    UniLoraModel,
)
from .methods.vblora import (
    VBLoRAConfig,
    VBLoRAModel,
)
from .methods.vera import (
    VeraConfig,
    VeraModel,
)
from .methods.waveft import (
    WaveFTConfig,
    WaveFTModel,
)
from .methods.xlora.config import (
    XLoraConfig,
)
from .methods.xlora.model import (
    XLoraModel,
)
from .mixed_model import (
    PeftMixedModel,
)
from .model import (
    PeftModel,
)
from .registry import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from .status import (
    get_layer_status,
    get_model_status,
)
from .stream import (
    merge_checkpoint,
)
from .tuners.lora.arrow import (
    create_arrow_model,
)
from .types import (
    PeftType,
    TaskType,
)
from .utils.constants import (
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
)
from .utils.other import (
    cast_mixed_precision_params,
    prepare_model_for_kbit_training,
    shift_tokens_right,
)

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdamssConfig",
    "AdamssModel",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BOFTModel",
    "BdLoraConfig",
    "BeftConfig",
    "BeftModel",
    "C3AConfig",
    "C3AModel",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "ChangedConfigWarning",
    "DeftConfig",
    "DeftModel",
    "DeloraConfig",
    "DeloraModel",
    "EvaConfig",
    "FourierFTConfig",
    "FourierFTModel",
    "FrodConfig",
    "FrodModel",
    "GloraConfig",
    "GloraModel",
    "GraloraConfig",
    "GraloraModel",
    "HRAConfig",
    "HRAModel",
    "HiraConfig",
    "HiraModel",
    "IA3Config",
    "IA3Model",
    "KasaConfig",
    "LNTuningConfig",
    "LNTuningModel",
    "LilyConfig",
    "LilyModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "LossyMergeWarning",
    "MissConfig",
    "MissModel",
    "MissingTensorsWarning",
    "MontecloraConfig",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "OFTConfig",
    "OFTModel",
    "OSFConfig",
    "OSFModel",
    "OtherBaseWarning",
    "PeanutConfig",
    "PeanutModel",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PolyConfig",
    "PolyModel",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "PsoftConfig",
    "PsoftModel",
    "PveraConfig",
    "PveraModel",
    "RandLoraConfig",
    "RandLoraModel",
    "RoadConfig",
    "RoadModel",
    "ShadowConfig",
    "ShadowModel",
    "ShiraConfig",
    "ShiraModel",
    "SupertuningConfig",
    "SupertuningModel",
    "TaskType",
    "TinyLoraConfig",
    "TinyLoraModel",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "UnexpectedTensorsWarning",
    "UniLoraConfig",
    "UniLoraModel",
    "UnknownFieldWarning",
    "UnmatchedTargetWarning",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeloraConfig",
    "VeraConfig",
    "VeraModel",
    "WaveFTConfig",
    "WaveFTModel",
    "XLoraConfig",
    "XLoraModel",
    "adapter_parameters",
    "cast_mixed_precision_params",
    "compose_cartridge_adapters",
    "convert_to_lora",
    "create_arrow_model",
    "doctor",
    "estimate",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "merge_checkpoint",
    "plan",
    "prepare_model_for_kbit_training",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "set_strict",
    "shift_tokens_right",
]

__version__: str
