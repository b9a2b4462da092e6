"""What stands in place of a user's module and holds adapters, the state of those, and the walk that finds all such.

Which adapters are *loaded*, which are *active* and which are *trainable* are three independent states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, ClassVar

from torch import nn

from .lean import Lean

_TRAIN, _modules = nn.Module.train, attrgetter("_modules")
_changes = 0  # of what layers there are, and what tensors their adapters have, in any model


def changed() -> None:
    """Some model has other layers, or a layer other tensors, than before."""
    global _changes
    _changes += 1


def changes() -> int:
    """How often that has been so."""
    return _changes


class AdapterHost(Lean):
    """A module that holds adapters in place of one of the user's: a tuner layer or a wrapper of a whole module."""

    _below: ClassVar[tuple[str, ...]] = ()  # the children that are the user's own, where further hosts may stand
    _active: tuple[str, ...] = ()
    _disabled: bool = False
    merged: Any = False  # whether adapters are written into the user's module, which layers alone do
    merged_adapters: Any = ()
    _trainable: dict[str, bool] | None = None  # what enabling will make trainable; None while enabled

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        changed()
        return super().__new__(cls)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in order."""
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """Same as `active_adapters`; a wrapper of a whole module that has one active adapter gives its name."""
        return list(self._active)

    @property
    def disable_adapters(self) -> bool:
        """Whether it runs as the user's module."""
        return self._disabled

    @property
    def _disable_adapters(self) -> bool:
        return self._disabled

    def holders(self) -> list[nn.Module]:
        """The modules that hold the tensors of its adapters."""
        return []

    def train(self, mode: bool = True) -> AdapterHost:
        """As torch's, at a cost that many loaded adapters hardly raise: their own modules are plain ones."""
        self.__dict__["training"] = mode
        mine = []
        for name, child in self._modules.items():
            if name in self._below and child is not None:
                child.train(mode)
            else:
                mine.append(child)
        for m in mine:  # grows on the way
            if m is None:
                continue
            if type(m).train is _TRAIN:
                m.__dict__["training"] = mode
                mine += m._modules.values()
            else:
                m.train(mode)
        return self

    def _get_available_adapters(self) -> set[str]:
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """The parameters of adapter `name`."""
        raise NotImplementedError

    def never_trained(self, name: str) -> Sequence[nn.Parameter]:
        """Those of the parameters of adapter `name` that stay frozen."""
        return ()

    def _set_disabled(self, disabled: bool) -> None:
        raise NotImplementedError

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the parameters of these adapters trainable or frozen; unknown names are ignored.

        What is set while disabled holds after enabling.
        """
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            if self._trainable is not None:
                self._trainable[name] = requires_grad
            if requires_grad and (call := self.__dict__.get("call")) is not None:
                call.frozen = False
            for parameter in self.adapter_parameters(name):
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
            for parameter in self.never_trained(name) if requires_grad else ():
                parameter.requires_grad_(False)

    def enable_adapters(self, enabled: bool) -> None:
        """Run with the active adapters, or as the user's module, with nothing trainable.

        What is merged is taken out while disabled. Enabling gives back what was trainable and merged before.
        """
        if enabled == (not self._disabled):
            return
        if enabled:
            self._set_disabled(False)
            flags, self._trainable = self._trainable or {}, None
            for name, flag in flags.items():
                if flag:  # what is not is frozen already, unless a layer that shares its tensors has them trained
                    self.set_requires_grad(name, True)
        else:
            names = self._get_available_adapters()
            flags = {n: any(q.requires_grad for q in self.adapter_parameters(n)) for n in names}
            self.set_requires_grad(list(names), False)
            self._set_disabled(True)
            self._trainable = flags


def below(model: nn.Module) -> tuple[list[nn.Module], bool]:
    """A module and all below it, each once, level by level, without the modules of adapters; whether some stand at
    several places. The quickest walk there is, for whom names and order do not matter."""
    seen: dict[int, nn.Module] = {id(model): model}
    level, places, holds = [model], 1, Holding()
    while level:
        own: list[Any] = [m for m in level if holds[type(m)]]
        plain = [m for m in level if not holds[type(m)]] if own else level
        children = [*chain.from_iterable(map(dict.values, map(_modules, plain)))]
        children += [m._modules[k] for m in own for k in m._below]
        if any(map(is_, children, repeat(None))):
            children = [child for child in children if child is not None]
        places += len(children)
        new = dict(zip(map(id, children), children, strict=True))
        level = [*new.values()] if seen.keys().isdisjoint(new) else [m for key, m in new.items() if key not in seen]
        seen.update(new)
    return list(seen.values()), places > len(seen)


def standing(modules: Sequence[nn.Module]) -> list[Any]:
    """Those of the modules that `below` gives which hold adapters."""
    holds = Holding()
    return [m for m in modules if holds[type(m)]]


def hosts(model: nn.Module) -> list[Any]:
    """Every tuner layer and wrapper of a model, without their places: `tuner_layers` takes four times as long."""
    return standing(below(model)[0])


def tuner_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, layer) of every tuner layer and wrapper below a module; its cost does not depend on how many adapters
    are loaded, because the walk never enters an adapter's own modules."""
    stack: list[tuple[str, Any]] = [(prefix, module)]
    seen: set[int] = set()
    holds = Holding()
    while stack:
        path, m = stack.pop()
        key = id(m)
        if key in seen:
            continue
        seen.add(key)
        children = m._modules
        if holds[type(m)]:
            yield path, m
            children = {k: children[k] for k in m._below}
        start = f"{path}." if path else ""
        inner = [(start + k, c) for k, c in children.items() if c is not None and (c._modules or holds[type(c)])]
        stack += inner[::-1]


class Holding(dict[type, bool]):
    """Whether a class is one of hosts, looked up once for each."""

    def __missing__(self, kind: type) -> bool:
        found = self[kind] = issubclass(kind, AdapterHost)
        return found
