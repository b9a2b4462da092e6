"""Modules without what torch makes for the hooks of every module, until somebody registers one.

A torch module holds eleven tables for hooks, nearly always empty; a layer with adapters is made of many modules. A lean
module reads empty tables that all lean modules share, and gets tables of its own by the first `register_..._hook`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn


class _NoHooks(OrderedDict[Any, Any]):
    """The hooks of all modules that have none."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError(
            "A table of hooks was written to directly, but this one belongs to all modules without hooks. Use the "
            "module's methods `register_forward_hook`, `register_full_backward_hook` and the like."
        )

    def __reduce__(self) -> str:
        return "_NO_HOOKS"


class _NoNames(frozenset[str]):
    """The names of buffers that are not saved, in all modules without such."""

    def discard(self, name: str) -> None:
        """Nothing is there."""


class _NoBuffers(dict[str, Any]):
    """The buffers of all modules that have none."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError(f"A buffer {key!r} was written into a table of all modules without any. Use `register_buffer`.")

    def __reduce__(self) -> str:
        return "NO_BUFFERS"


NO_BUFFERS = _NoBuffers()
_NO_HOOKS, _NO_NAMES = _NoHooks(), _NoNames()
_DEFAULTS = nn.Module().__dict__
TABLES = tuple(name for name, value in _DEFAULTS.items() if isinstance(value, OrderedDict))
_NAMES = "_non_persistent_buffers_set"
_OWN = ("_parameters", "_buffers", "_modules")
SHARED = frozenset(_DEFAULTS) - {*_OWN, "training"}  # what a lean module need not hold


class Lean(nn.Module):
    """What a class of modules inherits, before its torch class; it is made without the torch class's constructor."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def owned(module: nn.Module) -> None:
    """Give a lean module tables of its own."""
    d = module.__dict__
    for name in TABLES:
        if name not in d:
            d[name] = OrderedDict()
    if _NAMES not in d:
        d[_NAMES] = set()
    if d["_buffers"] is NO_BUFFERS:
        d["_buffers"] = {}


def _first_owned(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        owned(self)
        return method(self, *args, **kwargs)

    return register


for _name, _value in _DEFAULTS.items():
    if _name not in _OWN:
        setattr(Lean, _name, _NO_HOOKS if _name in TABLES else _NO_NAMES if _name == _NAMES else _value)
for _name in dir(nn.Module):
    if _name == "register_buffer" or ("register" in _name and _name.endswith("_hook")):
        setattr(Lean, _name, _first_owned(getattr(nn.Module, _name)))
