"""Which adapters can take each other's place."""

from __future__ import annotations

import dataclasses

from ..config import PeftConfig
from ..types import plain

# The fields in which two adapters must agree: what is built into the layers' modules.
CONFIG_KEYS_TO_CHECK = {"LORA": ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}
# The fields of other methods that need not: what is selected, what is known of the file, and what the weights bring.
SELECTED = frozenset(
    [
        *("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform"),
        *("layers_pattern", "trainable_token_indices", "layer_replication", "ensure_weight_tying"),
        *("feedforward_modules", "target_modules_to_tie", "modules_to_tie"),
    ]
)
OF_THE_FILE = frozenset(
    [
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config"),
    ]
)
OF_THE_WEIGHTS = frozenset(
    [
        *("r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "module_config"),
        *("init_weights", "init_ia3_weights", "prompt_tuning_init", "prompt_tuning_init_text"),
        *("tokenizer_name_or_path", "tokenizer_kwargs"),
        *("target_r", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
    ]
)


# What is not built into modules that run at inference, or follows the weights.
OF_TRAINING = frozenset({"use_rslora", "lora_dropout", "alpha_pattern"})


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError if the weights of one adapter cannot take the place of the other's."""
    check_kind(config0, config1)
    for name in _names(config0):
        one, other = getattr(config0, name, None), getattr(config1, name, None)
        if one != other and (one or other):
            raise ValueError(
                f"Configs are incompatible: for {name}, {one} != {other}. Load the new adapter under a name of its own."
            )


def unlike(config0: PeftConfig, config1: PeftConfig) -> str | None:
    """The first field that keeps one adapter from running in the other's tensors at inference, or None.

    Raises ValueError for adapters of two methods.
    """
    check_kind(config0, config1)
    fields = [name for name in _names(config0) if name not in OF_TRAINING] + ["lora_bias"]
    values = ((name, getattr(config0, name, None), getattr(config1, name, None)) for name in fields)
    return next((name for name, one, other in values if one != other and (one or other)), None)


def _names(config: PeftConfig) -> list[str]:
    free = (SELECTED | OF_THE_FILE | OF_THE_WEIGHTS) - getattr(type(config), "together", frozenset())
    kind = plain(config.peft_type)
    return CONFIG_KEYS_TO_CHECK.get(kind) or [f.name for f in dataclasses.fields(config) if f.name not in free]


def check_kind(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError for adapters of two methods."""
    if config0.peft_type != config1.peft_type:
        raise ValueError(
            f"Incompatible PEFT types found: {plain(config0.peft_type)} and {plain(config1.peft_type)}. Load the new "
            "adapter under a name of its own."
        )
