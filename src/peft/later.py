"""Data: the names and modules of the interface that this release does not have yet.

A name leaves this list in the change that brings it.
"""

from __future__ import annotations

from importlib.util import find_spec

NAMES = frozenset(
    [
        "BasePromptEncoder",
        "_prepare_prompt_learning_config",
        "bloom_model_postprocess_past_key_value",
        "factorization",
        "get_gptqmodel_quant_linear",
        "map_cache_to_layer_device_map",
    ]
)

# What the original's modules hold for their own use; this library does the same elsewhere, or has no need of it.
INTERNAL = frozenset(
    [
        "BufferDict",
        "LoraEmbeddingATPHolder",
        "LoraVariant",
        "TpInfo",
        "VARIANT_KWARG_KEYS",
        "_prepare_prompt_learning_config",
        "_set_trainable",
        "check_import_allowlist",
        "create_attention_mask",
        "dispatch_default",
        "dtensor_from_local_like",
        "get_alora_offsets_for_forward",
        "get_alora_offsets_for_generate",
        "get_default_import_allowlist",
        "get_embedding_layer_name",
        "get_layer_device_map",
        "has_valid_embedding_base_layer",
        "is_gptqmodel_quant_linear",
        "is_transformers_dtensor_tp",
        "loftq_init",
        "set_additional_trainable_modules",
        "skip_init_on_device",
        "starcoder_model_postprocess_past_key_value",
        "warn_msg_weight_tying",
    ]
)

# Folders below peft.tuners.
TUNERS = frozenset(
    [
        "adalora",
        "adamss",
        "adaption_prompt",
        "beft",
        "boft",
        "c3a",
        "cpt",
        "deft",
        "delora",
        "fourierft",
        "frod",
        "glora",
        "gralora",
        "hira",
        "hra",
        "ia3",
        "lily",
        "ln_tuning",
        "miss",
        "multitask_prompt_tuning",
        "oft",
        "osf",
        "p_tuning",
        "peanut",
        "prompt_tuning",
        "psoft",
        "pvera",
        "randlora",
        "road",
        "shadow",
        "shira",
        "supertuning",
        "tinylora",
        "unilora",
        "vblora",
        "vera",
        "waveft",
        "xlora",
    ]
)
LORA = frozenset(
    [
        "dora",
        "tp_layer",
        "variants",
    ]
)


def is_later_module(fullname: str) -> bool:
    """Whether a module of that full name belongs to the interface but not to this release."""
    parts = fullname.split(".")
    if parts[1] != "tuners" or len(parts) < 3:
        return False
    if parts[2] == "lora":
        return len(parts) == 4 and parts[3] in LORA
    method = find_spec(f"peft.methods.{parts[2]}") if parts[2] in TUNERS else None
    if method is None or len(parts) < 4 or parts[3] in ("bnb", "config", "layer", "model"):
        return parts[2] in TUNERS and method is None
    return method.submodule_search_locations is None or find_spec(f"{method.name}.{parts[3]}") is None
