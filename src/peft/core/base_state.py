"""The base model's weights under their original names, whatever stands around its layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import listing
from . import sharded
from .host import Holding

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})  # names that torch puts in


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's parameters and persistent buffers as they were named before any adapter was added.

    Arguments:
        model: a PeftModel, a model with injected layers, or a plain model.
    """
    state: OrderedDict[str, Tensor] = OrderedDict()
    with sharded.summoned(model) as opened:
        for original, _, module in _walk(model_below(model)):
            module._save_to_state_dict(state, original, False)  # one module's own tensors, quantised ones included
            spread = {original + n: p for n, p in module._parameters.items() if sharded.is_zero(p)}
            state.update((n, sharded.full(p)) for n, p in spread.items() if p is not None)
        return {k: v.clone() for k, v in state.items()} if opened else dict(state)


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Load weights with original names into the base model below the adapters.

    Arguments:
        model: a PeftModel, a model with injected layers, or a plain model.
        state_dict: original name -> tensor.
        strict: raise RuntimeError if names are missing or unexpected.

    Returns (missing_keys, unexpected_keys), by original name.
    """
    with sharded.summoned(model, write=True) as opened:
        return _set(model_below(model), state_dict, strict, opened)


def _set(base: nn.Module, state_dict: Mapping[str, Tensor], strict: bool, opened: bool) -> _IncompatibleKeys:
    live: dict[str, str] = {}
    spread: dict[str, Tensor] = {}
    for original, prefix, module in _walk(base):
        own: OrderedDict[str, Tensor] = OrderedDict()
        module._save_to_state_dict(own, "", False)
        live.update({original + name: prefix + name for name in own})
        named = ((original + n, p) for n, p in module._parameters.items() if p is not None)
        spread.update((n, p) for n, p in named if opened or sharded.is_spread(p))
    missing = [n for n in live if n not in state_dict]
    unexpected = [n for n in state_dict if n not in live]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"The state dictionary does not fit {type(base).__name__}: missing {listing(missing) or 'none'}, "
            f"unexpected {listing(unexpected) or 'none'}. Pass strict=False to load the rest."
        )
    apart = {n: p for n, p in spread.items() if not sharded.is_mesh(p)}  # whose wrappers give modules other names
    with torch.no_grad():
        for name, tensor in apart.items():
            if name in state_dict:
                sharded.put(tensor, state_dict[name])
    given = {n: v for n, v in state_dict.items() if n in live and n not in apart}
    parts = {n: sharded.like(v, spread[n]) if n in spread else v for n, v in given.items()}
    base.load_state_dict({live[n]: v for n, v in parts.items()}, strict=False)
    return _IncompatibleKeys(missing, unexpected)


def original_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(prefix of the original name, module) of everything that belongs to the base model below the adapters."""
    for original, _, module in _walk(model_below(model)):
        yield original, module


def saved_tensors(module: nn.Module) -> list[str]:
    """The names of a module's own parameters and persistent buffers."""
    buffers = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
    return [n for n in (*module._parameters, *buffers) if getattr(module, n) is not None]


def model_below(model: nn.Module) -> nn.Module:
    """The model below the adapters; a model that has no such method, itself."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def _walk(module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(original prefix, live prefix, module) of everything that belongs to the base model."""
    stack: list[tuple[str, str, Any]] = [("", "", module)]
    holds = Holding()
    while stack:
        original, live, found = stack.pop()
        while holds[type(found)]:
            name = found._below[0]
            found, live = found._modules[name], f"{live}{name}."
        yield original, live, found
        if children := found._modules:
            inner = [
                (original if name in WRAPPERS else f"{original}{name}.", f"{live}{name}.", child)
                for name, child in children.items()
                if child is not None
            ]
            stack += inner[::-1]
