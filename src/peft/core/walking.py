"""The walk over a model that finds targets: paths and modules, in order, nothing below a tuner layer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import views
from .tie import inside

if TYPE_CHECKING:
    from torch import nn

_kinds: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def kind_of(cls: Any) -> str:
    """What a class is to matching: "aux" (trained copy), "tuner" (has adapters), "linear" or "other"."""
    kind = _kinds.get(cls)
    if kind is None:
        kind = _kinds[cls] = _classify(cls)
    return kind


def _classify(cls: Any) -> str:
    if hasattr(cls, "unload_and_optionally_merge_module"):
        return "aux"
    if hasattr(cls, "adapter_layer_names"):
        return "tuner"
    return "linear" if views.is_linear(cls) else "other"


def walk(model: nn.Module, again: list[tuple[str, nn.Module]] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Path and module, in the order of `named_modules`, each module once, and nothing below a tuner layer.

    `again` receives path and module of every further place.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    kinds: dict[type, str] = {}  # a function for each module would cost more than all else here
    stack = [("", model)]
    while stack:
        place = stack.pop()
        path, module = place
        key = id(module)
        if key in seen:
            if again is not None:
                again.append(place)
            continue
        seen.add(key)
        found.append(place)
        inner = module if type(module) in kinds else inside(module)
        kind = type(inner)
        if kind not in kinds:
            kinds[kind] = kind_of(kind)
        if inner._modules and kinds[kind] not in ("aux", "tuner"):
            prefix = path + "." if path else ""
            stack += [(prefix + name, m) for name, m in reversed(inner._modules.items()) if m is not None]
    return iter(found)


def model_type(model: nn.Module) -> str:
    """`config.model_type` of the model, whose config may be a dictionary; "custom" if it has none."""
    config = getattr(model, "config", None)
    kind = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return kind if isinstance(kind, str) else "custom"
