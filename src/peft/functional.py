"""What can be done to the adapters of any model, with or without a PeftModel around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import lazy
from .core.layer import BaseTunerLayer, tuner_layers

if TYPE_CHECKING:
    from .core.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
    from .create import inject_adapter_in_model

_NAMES = {
    "peft.core.checkpoint": "get_peft_model_state_dict set_peft_model_state_dict",
    "peft.create": "inject_adapter_in_model",
}
__getattr__, __dir__, _ = lazy.names(__name__, _NAMES)

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[nn.Module] = BaseTunerLayer,
) -> None:
    """Activate one or several adapters everywhere in a model.

    Arguments:
        model: a model with adapter layers.
        adapter_name: one name, or several in order.
        inference_mode: leave them frozen.
        layer_cls: only layers of this class, beside wrappers of whole modules.
    """
    for _, layer in tuner_layers(model):
        wanted = isinstance(layer, layer_cls) or not isinstance(layer, BaseTunerLayer)
        if wanted:
            layer.set_adapter(adapter_name, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make the parameters of adapters trainable, or freeze them; whether they are active does not change."""
    for _, layer in tuner_layers(model):
        layer.set_requires_grad(adapter_names, requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type[nn.Module] = BaseTunerLayer
) -> list[str] | None:
    """Remove an adapter everywhere in a model; `model.peft_config` is left to the caller.

    Arguments:
        model: a model with adapter layers.
        adapter_name: the adapter.
        prefix: what the names of its tensors start with; kept for callers that pass it.
        layer_cls: only layers of this class, beside wrappers of whole modules.

    Returns the names that are active now, or None if there are no adapter layers.
    """
    active: list[str] | None = None
    for _, layer in tuner_layers(model):
        tuned = isinstance(layer, BaseTunerLayer)
        if tuned and not isinstance(layer, layer_cls):
            continue
        layer.delete_adapter(adapter_name)
        if tuned and not active:
            active = list(layer.active_adapters)
    return active


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """The parameters of an adapter from half precision or float8 to float32, for stable training.

    Arguments:
        model: a model with adapter layers.
        adapter_name: the adapter.
        autocast_adapter_dtype: False does nothing.
    """
    if not autocast_adapter_dtype:
        return
    for _, layer in tuner_layers(model):
        if not isinstance(layer, BaseTunerLayer):
            continue  # copies of whole modules keep the dtype of the model
        for parameter in layer.adapter_parameters(adapter_name):
            if parameter.dtype in (torch.float16, torch.bfloat16) or "float8" in str(parameter.dtype):
                parameter.data = parameter.data.to(torch.float32)
