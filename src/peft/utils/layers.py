"""What other libraries ask of single layers and tuners."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..core.layer import BaseTunerLayer
from ..core.merge import adapters_to_merge
from ..core.replicate import replicate


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters that a merge would add to a layer, in order.

    Raises TypeError for a string.
    """
    return adapters_to_merge(module, adapter_names)


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module; with `share_weights` its parameters and buffers are the original's."""
    if not share_weights:
        return copy.deepcopy(module)
    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def replicate_layers(model: nn.Module, layer_map: list[tuple[int, int]]) -> None:
    """Rebuild a model's layer list as the concatenation of ranges [start, end) of it, on the same weights."""
    replicate(model, layer_map)


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The full name of a module in a model; "" if it is not there."""
    return next((name for name, m in model.named_modules() if m is reference_module), "")


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """Where each module with parameters of its own lies: name -> device."""
    places = {}
    for name, module in model.named_modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None:
            places[name] = own.device
    return places
