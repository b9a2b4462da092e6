"""Methods under the paths that other libraries import."""

from __future__ import annotations

from .. import lazy, registry

_NAMES = {
    "peft.algebra.conversion": "convert_to_lora save_as_lora",
    "peft.methods.lora.config": """
        ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig
        MontecloraConfig VeloraConfig""",
    "peft.methods.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "peft.methods.lora.loraga": "preprocess_loraga",
    "peft.tuners.lora.arrow": "create_arrow_model",
    "peft.methods.cartridge.utils": """
        compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text
        prompt_embeddings_from_past_key_values""",
    "peft.methods.prompt_tuning": "PromptTuningInit",
    "peft.methods.p_tuning": "PromptEncoderReparameterizationType",
    "peft.methods.multitask_prompt_tuning": "MultitaskPromptTuningInit",
    "peft.prompts.encoder": "BasePromptEncoder",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, registry.exports(), _NAMES)
