"""Where a tuner layer files its adapters' tensors: a child for each of the peer's names, in it an entry per adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..known import SCALARS
from .buffers import BufferDict, SavedBuffers, tensors_below
from .cells import celled
from .host import AdapterHost, changed
from .sharded import unwrapped
from .stack import Adapter, Slot, Stack
from .views import ModuleDict, ParameterDict, Template

_MODULES, _PARAMETERS = Template(nn.ModuleDict(), ModuleDict), Template(celled(nn.ParameterDict()), ParameterDict)
_BUFFERS, _SAVED = Template(celled(BufferDict())), Template(celled(SavedBuffers()))


class Homes(AdapterHost):
    """The part of a tuner layer that files tensors; `stack`, `_beside` and `_replan` are the layer's."""

    adapters: dict[str, Adapter]
    shares: frozenset[str] = frozenset()  # adapters whose tensors belong to another layer
    _home_order: ClassVar[tuple[str, ...]] = ()
    _parameter_homes: ClassVar[frozenset[str]] = frozenset()
    by_hand: ClassVar[bool] = False  # its class is a program's own
    of_programs: ClassVar[tuple[type, ...]] = ()  # what such classes are, too: before the others, and after them
    _plain: frozenset[str] = frozenset()  # names of the plain values of all adapters, whatever their method
    _beside: Callable[[Tensor], Tensor]
    _replan: Callable[[], None]
    readable: Callable[[], AbstractContextManager[None]]
    _in_sight: Callable[[], AbstractContextManager[None]]
    stack: Callable[..., Stack]
    original_weight_device: Callable[[], torch.device]

    def _file(self, key: str, name: str, value: Any, p: Adapter) -> None:
        """Put a tensor or module where `p.<key>` finds it; plain values go into p itself."""
        if type(value) in SCALARS or not isinstance(value, (nn.Module, Tensor)):
            p.__dict__[key] = value
            if key not in self._plain:
                self.__dict__["_plain"] = self._plain | {key}
        elif type(value) is nn.Identity and key in self._home_order and key not in self._modules:
            p.idle = (*p.idle, key)
        elif isinstance(value, nn.Module):
            home = self._idle_home(key) or self._home(key, _MODULES)
            value.__dict__["training"] = self.training
            if type(home) is ModuleDict:
                home._modules[name] = value
            else:
                home[name] = value
        elif isinstance(value, nn.Parameter):
            home = self._home(key, _PARAMETERS)
            if type(home) is ModuleDict:  # another method keeps modules under this name: one home holds both
                home = self._modules[key] = celled(nn.ParameterDict(home._modules))
            home[name] = value
        else:
            self._home(key, _SAVED if isinstance(value, nn.Buffer) else _BUFFERS).hold(name, value)

    def _home(self, key: str, template: Template) -> Any:
        home = self._modules.get(key)
        if home is None:
            home = self._modules[key] = template.new()
            home.__dict__["training"] = self.training
        return home

    def open_homes(self) -> None:
        """Have a home under every name, empty where no adapter has tensors there."""
        for key in self._home_order:
            self._home(key, _PARAMETERS if key in self._parameter_homes else _MODULES)

    def _held(self) -> list[tuple[str, Any]]:
        """The homes by name."""
        return [(key, home) for key, home in self._modules.items() if key != "base_layer" and home is not None]

    def _idle_home(self, key: str) -> Any:
        """The home of modules that do nothing, made now; None where there is none to make."""
        idle = [p for p in self.adapters.values() if key in p.idle]
        if not idle or key in self._modules:
            return None
        home = self._home(key, _MODULES)
        for p in idle:
            p.idle = tuple(k for k in p.idle if k != key)
            self._file(key, p.name, nn.Identity(), p)
        self._replan()
        return home

    def keep(self, p: Adapter, key: str, value: Tensor) -> None:
        """File a derived tensor, which moves with the layer, is not saved, and follows what is loaded into the base."""
        if not self._load_state_dict_post_hooks:
            self.register_load_state_dict_post_hook(_follow_base)
        self._file(key, p.name, self._beside(value), p)

    def begin(self, p: Adapter, root: Stack) -> None:
        """Give a new adapter its first values."""
        p.method.init(p, root)

    def begins_alike(self) -> bool:
        """Whether nothing but the method says what these are."""
        return True

    @torch.no_grad()
    def restart(self, p: Adapter, **changes: Any) -> None:
        """Give adapter p first values anew; `changes` are settings that hold for this once."""
        own, p.settings = p.settings, copy.copy(p.settings)
        p.settings.__dict__.update(changes)
        try:
            with self.readable(), self._in_sight():
                p.method.init(p, self.stack(()))
                p.method.derive(p, self.stack(()))
        finally:
            p.settings = own

    @torch.no_grad()
    def derive(self, p: Adapter, key: str) -> None:
        """Compute what adapter p derives from base weights that were not there before; what is trained stays.

        Raises ValueError if they give no tensor `key`.
        """
        with self.readable():
            if self.original_weight_device().type != "meta":
                held = [(slot.tensor, slot.tensor.clone()) for slot in self.slots(p.name)]
                p.method.derive(p, self.stack(()))
                for tensor, value in held:
                    tensor.copy_(value)
        if not p.has(key):
            raise ValueError(
                f"{key!r} of adapter {p.name!r} at {p.path!r} is made of the base model's weights, which have no "
                "numbers yet, or had none when the adapter was made (meta device). Load them first, then the adapter."
            )

    def follow_base(self) -> None:
        """The base weight has other numbers: compute anew what adapters derive from it."""
        for p in self.adapters.values():
            with self.readable():
                p.method.follow_base(p, self.stack(()))

    def _drop(self, name: str) -> None:
        self._forget_plans()
        for key, home in self._held():
            if name in home:
                with suppress(AttributeError):  # of one that was not filed in full
                    del home[name]
                if not len(home) and not self.by_hand:
                    del self._modules[key]
        self.adapters.pop(name, None)

    def _forget_plans(self) -> None:
        changed()
        for p in self.adapters.values():
            p.plan = None
        if "_flag" in self.__dict__:
            for p in self.adapters.values():
                p.twin = None

    def places(self, name: str) -> Iterator[tuple[dict[str, Any], str]]:
        """Where the parameters of adapter `name` are held: tables of modules, and their names there."""
        for _, home in () if name in self.shares else self._held():
            child = home._modules.get(name)
            if child is None:
                if home._parameters.get(name) is not None:
                    yield home._parameters, name
                continue
            for m in child.modules() if child._modules else (child,):
                yield from ((m._parameters, k) for k, q in m._parameters.items() if q is not None)

    def slots(self, name: str) -> list[Slot]:
        """Every saved tensor of adapter `name`."""
        if name not in self.adapters or name in self.shares:
            return []
        key_of = self.adapters[name].method.checkpoint_key
        found = []
        for key, home in self._held():
            child = home._modules.get(name)
            if child is None:
                if name in home and not (isinstance(home, BufferDict) and home.unsaved(name)):
                    found.append(Slot(key_of(key), f"{key}.{name}", home, name))
                continue
            if not child._modules and not child._buffers:
                for a, q in child._parameters.items():
                    if q is not None:
                        found.append(Slot(key_of(f"{key}.{a}"), f"{key}.{name}.{a}", child, a))
                continue
            for owner, leaf, attr in tensors_below(child):
                found.append(Slot(key_of(f"{key}.{unwrapped(leaf)}"), f"{key}.{name}.{leaf}", owner, attr))
        return found

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of adapter `name`."""
        for table, key in self.places(name):
            yield table[key]


@torch.no_grad()
def derived_again(method: Any, p: Adapter, inner: Stack) -> None:
    """The `follow_base` of methods whose `derive` can be repeated, where the base weight has numbers."""
    if inner.layer.original_weight_device().type != "meta":
        method.derive(p, inner)


def _follow_base(layer: Homes, keys: Any) -> None:
    """After loading a state dict: what was derived from the base weight may be stale."""
    layer.follow_base()
