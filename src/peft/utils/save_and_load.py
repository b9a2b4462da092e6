"""State dicts of adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import lazy
from ..core import sharded
from ..core.checkpoint import adapter_config
from ..core.entries import entries_of
from ..core.fill import paired

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


def _maybe_shard_state_dict_for_tp(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str) -> None:
    """Spread a checkpoint's tensors, in the dictionary, as the adapter's own are that they are for.

    Loading does so by itself; this is for programs that write the tensors themselves.

    Arguments:
        model: a PeftModel or a model with injected layers.
        state_dict: checkpoint key, or name in the live model -> whole tensor, on every process.
        adapter_name: the adapter.
    """
    entries = entries_of(model, adapter_config(model, adapter_name), adapter_name)
    found, _ = paired(entries, state_dict)
    keys = {id(value): key for key, value in state_dict.items()}
    for entry, value in found.values():
        if sharded.is_mesh(entry.tensor) and not sharded.is_mesh(value):
            state_dict[keys[id(value)]] = sharded.like(value.to(entry.tensor.dtype), entry.tensor)


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """`torch.load` that runs no code of the file unless it is told to."""
    return torch.load(*args, weights_only=weights_only, **kwargs)
