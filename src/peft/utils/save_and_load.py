"""State dicts of adapters."""

from __future__ import annotations

from typing import Any

import torch

from .. import lazy

_NAMES = {
    "peft.core.checkpoint": """
        get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict
        set_peft_model_state_dict""",
    "peft.core.defaults": """
        EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME""",
    "peft.core.wrappers": "AuxiliaryTrainingWrapper",
    "peft.errors": "PeftWarning",
    "peft.import_utils": "is_transformers_ge_v5",
    "peft.registry": "PEFT_TYPE_TO_TUNER_MAPPING",
    "peft.types": "PeftType",
    "peft.utils.other": "check_file_exists_on_hf_hub infer_device match_target_against_key",
}
__getattr__, __dir__, _ = lazy.names(__name__, _NAMES)


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """`torch.load` that runs no code of the file unless it is told to."""
    return torch.load(*args, weights_only=weights_only, **kwargs)
