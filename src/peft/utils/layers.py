"""What other libraries ask of single layers and tuners."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Inside the block the weights that accelerate keeps elsewhere are here; changes are taken back."""
    found: list[tuple[nn.Module, Any]] = [(m, getattr(m, "_hf_hook", None)) for m in layer.modules()]
    hooks = [(m, hook) for m, hook in found if getattr(hook, "offload", False)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            _take_back(module, hook)
            hook.post_forward(module, None)


def _take_back(module: nn.Module, hook: Any) -> None:
    """Write the weights of a module into the place that its hook loads them from."""
    store = hook.weights_map
    data = getattr(store, "dataset", store)
    held: Any = getattr(data, "state_dict", data)
    for name, tensor in module.named_parameters(recurse=hook.place_submodules):
        key = getattr(store, "prefix", "") + name
        if key in held:
            held[key] = tensor.detach().cpu()
        elif key in getattr(data, "index", ()):
            from accelerate.utils import offload_weight

            offload_weight(tensor.detach().cpu(), key, data.save_folder, data.index)
