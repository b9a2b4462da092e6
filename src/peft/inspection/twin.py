"""A model of the same structure on hollow memory, quantised weights with all that lies beside them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..core import storage
from ..kernels.modes import HELD
from .asked import EstimateError
from .hollow import EXACT, Hollow

LEAVES = (nn.Module, type, ModuleType, FunctionType, str, bytes, int, float)


def copied(model: nn.Module, ledger: Hollow, dtype: torch.dtype | None = None) -> nn.Module:
    """The copy; tensors that share memory share it there. `dtype` is that of floating parameters and buffers."""
    _refuse(model)
    memo: dict[int, Any] = {}
    storages: dict[tuple[int, torch.dtype], Tensor] = {}

    def twin(name: str, t: Tensor, dtype: torch.dtype | None) -> Any:
        if hasattr(t, "__tensor_flatten__"):
            return _opened(name, t, lambda name, part: twin(name, part, None))
        key = t.untyped_storage()._cdata, t.dtype
        if key not in storages:
            if _may_choose(t):
                ledger.hold([found := t.detach().cpu().clone()])
                return found
            length = t.untyped_storage().nbytes() // t.element_size()
            wanted = dtype if dtype is not None and t.is_floating_point() else t.dtype
            storages[key] = ledger.make(torch.empty(length, dtype=t.dtype, device="meta"), wanted)
        found = storages[key].as_strided(t.size(), t.stride(), t.storage_offset())
        if type(t) is nn.Parameter:
            return nn.Parameter(found, t.requires_grad)
        return found if type(t) in HELD else torch.Tensor._make_subclass(type(t), found, t.requires_grad)

    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    beside = [("", t) for m in model.modules() for t in _beside(m)]
    for (name, t), kind in [*((o, dtype) for o in own), *((b, None) for b in beside)]:
        if id(t) not in memo:
            memo[id(t)] = twin(name, t, kind)
    found = copy.deepcopy(model, memo)
    for _, t in own:  # what a weight of another library knows of itself, which may name the module that has it
        if type(t) not in HELD and not hasattr(t, "__tensor_flatten__"):
            memo[id(t)].__dict__.update(copy.deepcopy(t.__dict__, memo))
    return found


def _refuse(model: nn.Module) -> None:
    """Raise for weights that are whole numbers in a module of no class that is known to hold such."""
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if type(p) is nn.Parameter and not p.is_floating_point() and storage.by_class(type(module)) is None:
                raise EstimateError(
                    f"The memory of a step with model={type(model).__name__} cannot be told: '{path}.{name}' is "
                    f"{str(p.dtype).removeprefix('torch.')} in a {type(module).__name__}, a quantised form that is not "
                    "known. Pass the model's configuration, or the model before it was quantised."
                )


def quantise(shadow: nn.Module, ledger: Hollow) -> None:
    """Move the modules of a library that quantises whatever is moved."""
    with ledger:
        for module in shadow.modules():
            if type(module._parameters.get("weight")) not in (*HELD, type(None)):
                module.to("cpu")
    gc.collect()  # what it was made from names the module that named it


def _may_choose(t: Tensor) -> bool:
    """Whether these are whole numbers that may choose a way, and are few enough to be copied."""
    whole = not (t.is_meta or t.is_floating_point() or isinstance(t, nn.Parameter))
    return whole and t.numel() * t.element_size() <= EXACT


def _opened(name: str, t: Any, twin: Any) -> Any:
    """A weight whose class lays out others, which are copied."""
    if any(c.__name__ == "DTensor" for c in type(t).__mro__):
        raise EstimateError(
            f"The memory of a step cannot be told: {name!r} is a {type(t).__qualname__}, spread over processes. Pass "
            "the model's configuration, or the model before it was spread."
        )
    names, context = t.__tensor_flatten__()
    parts = {n: twin(f"{name}.{n}", getattr(t, n)) for n in names}
    found = type(t).__tensor_unflatten__(parts, context, t.size(), t.stride())
    return nn.Parameter(found, t.requires_grad) if isinstance(t, nn.Parameter) else found


def _beside(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that a module, or a weight of it, has in attributes of its own."""
    seen: set[int] = set()

    def within(value: Any) -> Iterator[Tensor]:
        if id(value) in seen or isinstance(value, LEAVES):
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        parts = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ()
        for part in (*parts, *getattr(value, "__dict__", {}).values()):
            yield from within(part)

    tables = ("_parameters", "_buffers", "_modules")
    for value in [v for k, v in module.__dict__.items() if k not in tables]:
        yield from within(value)
    for p in module._parameters.values():
        if p is not None and type(p) not in HELD:
            yield from within(p.__dict__)
