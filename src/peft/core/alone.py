"""A layer that a program makes by itself, with no model around it, for the arithmetic of one adapter.

`Linear(nn.Linear(8, 8), "default", LoraConfig(r=4))` is what a wrapped model has in place of that layer: it runs,
merges and tells its update. Programs that merge files tensor by tensor make one for each.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import nn

from ..errors import nearest
from ..registry import config_class, tuner_class
from ..types import plain
from . import views
from .method import Site
from .views.linear import TransposedView

_ORDER = ("adapter_name", "config", "r", "lora_alpha")
_OF_PARAMETERS = ("adapter_name", "parameter_name", "config", "r", "lora_alpha")
# what the base layer says itself, or what places and not layers need
_KNOWN = frozenset(("is_target_conv_1d_layer", "loaded_in_8bit", "loaded_in_4bit", "current_key", "target_name")) | {
    "ephemeral_gpu_offload",
    "device_map",
    "tied_adapter",
}


def stated(given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; those without one come in the order of the layer's kind.

    Raises TypeError for arguments that are given twice or are too many, and without an adapter's name.
    """
    order = _OF_PARAMETERS if (len(given) > 1 and isinstance(given[1], str)) or "parameter_name" in named else _ORDER
    twice = sorted({*order[: len(given)]} & {*named})
    if twice or len(given) > len(order):
        raise TypeError(f"A layer takes base_layer, {', '.join(order)}; got {len(given)} of them in order and {twice}.")
    both = {**dict(zip(order, given, strict=False)), **named}
    if not isinstance(both.get("adapter_name"), str):
        raise TypeError(
            f"A layer is made for one adapter: adapter_name must be its name, got {both.get('adapter_name')!r}."
        )
    return both


def settings(family: str, config: Any, changes: dict[str, Any]) -> Any:
    """The adapter's configuration with what is stated beside it; the method's own defaults where none is given.

    Raises TypeError for what is no field of it, and what the configuration itself raises.
    """
    config = config_class(family.upper())() if config is None else config
    fields = {field.name for field in dataclasses.fields(config)}
    if "lora_alpha" in changes and "alpha" in fields:
        changes["alpha"] = changes.pop("lora_alpha")
    for name in changes:
        if name not in fields | _KNOWN:
            raise TypeError(f"{name!r} is no field of {type(config).__name__}.{nearest(name, fields)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the copy warns of, the original has said
        return dataclasses.replace(config, **{name: value for name, value in changes.items() if name in fields})


class _Turned(TransposedView):
    """An nn.Linear that holds a weight stored as (I, O), as its adapter's `fan_in_fan_out` says."""

    def shape(self, m: Any) -> tuple[int, int]:
        return (m.weight.shape[1], m.weight.shape[0])


def furnish(layer: Any, name: str, config: Any) -> None:
    """Put the adapter into a layer that has none of that name.

    Raises TypeError if its tensors are shared by the layers of a model.
    """
    if getattr(config, "fan_in_fan_out", False) and type(layer.get_base_layer()) is nn.Linear:
        layer.__dict__["view"] = _Turned()
    if hasattr(config, "refuse_unsupported"):
        config.refuse_unsupported()
    kind, base = tuner_class(config.peft_type), layer.get_base_layer()
    several = kind.uses_shared_state or layer.view.read_children
    if several:
        shared = f"Layers of {plain(config.peft_type)}"
        what = shared if kind.uses_shared_state else f"The parts of a {type(base).__name__}"
        raise TypeError(
            f"{what} belong together, so none can be made by itself. Wrap a model of that one module: "
            "get_peft_model(nn.Sequential(module), config)."
        )
    weight, dtype = layer.view.sample(base), views.dtype_beside(layer.view, base, False)
    device = torch.device("cpu") if weight is None else weight.device
    layer.add_adapter(name, kind.method_of(config), Site(base, layer.view, config, "", dtype, device, {}, layer))


def renewed(layer: Any, name: str, config: Any, changes: dict[str, Any]) -> None:
    """Give a layer an adapter of its own, anew if it has one of that name; it acts and learns if the name is active.

    Arguments:
        layer: the layer.
        name: the adapter.
        config: its configuration; None is the method's own defaults.
        changes: what is stated beside it.
    """
    stated = settings(layer.family, config, changes)
    if name in layer.adapters:
        layer._drop(name)
    furnish(layer, name, stated)
    layer.set_requires_grad(name, name in layer.active_adapters)
    layer._replan()
