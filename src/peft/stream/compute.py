"""The numbers of a merged tensor: the base's are read, the ordinary merge is run on them, and they are let go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.buffers import BufferDict
from ..core.layer import BaseTunerLayer
from ..core.method import Method
from ..core.shared import Sight
from .names import Group, Names
from .outcome import Value
from .skeleton import held


class Computer:
    """Computes values one at a time; what it holds meanwhile is that tensor, its bias, and the merge's blocks."""

    def __init__(self, names: Names):
        self.names = names

    def raw(self, value: Value) -> Tensor:
        """The numbers of the base that a value starts from."""
        known = [name for name in value.names if name in self.names.group_of]
        name = (known or value.names)[0]
        return self.base(self.names.numbers(name))[name]

    def base(self, group: Group) -> dict[str, Tensor]:
        """The base's tensors that a group makes."""
        return self.names.forward(group, self._read)

    def _read(self, key: str) -> Tensor:
        return self.names.tensors[key].read()

    def seen(self, sight: Sight) -> Sight:
        """A target whose weight is read from the base when it is asked for, and let go by whoever asks."""
        computer = self

        class Seen(Sight):
            def weight(self) -> Tensor:
                """The base weight, (..., O, I)."""
                with put(self.module, self.view.name, computer.of(self.module, self.view.name)):
                    return super().weight()

        return Seen(*sight)

    def of(self, module: nn.Module, attr: str) -> Tensor:
        """The numbers of the base that a tensor of the skeleton stands for."""
        tensor = held(module, attr)
        return self.raw(Value([name for name, place in self.names.places.items() if held(*place) is tensor]))

    @torch.no_grad()
    def merged(self, value: Value, start: Tensor | None = None) -> Tensor:
        """A value's numbers.

        Arguments:
            value: the value.
            start: the numbers that it starts from, if they are at hand; they are overwritten.
        """
        if value.own is not None:
            start = value.own.clone() if value.work else value.own
        elif start is None:
            start = self.raw(value)
        if not value.work:
            return start
        with ExitStack() as stack:
            return (self._bias if value.is_bias else self._weight)(value, start, stack)

    def _weight(self, value: Value, start: Tensor, stack: ExitStack) -> Tensor:
        bias = None if value.beside is None else self._start(value.beside)
        for layer, _ in value.work:
            base = layer.get_base_layer()
            stack.enter_context(put(base, layer.view.name, start))
            if bias is not None and layer.view.bias_name and held(base, layer.view.bias_name) is not None:
                stack.enter_context(put(base, layer.view.bias_name, bias))
        for layer, names in value.work:
            layer.view.check_stored(layer.get_base_layer(), layer._where())
            for name in names:
                stack.enter_context(derived(layer, name))
        for layer, names in value.work:
            layer._write(names)
            written = held(layer.get_base_layer(), layer.view.name).data
            if written.data_ptr() != start.data_ptr():  # a merge may put other memory in place of what was there
                start.copy_(written)
        return start

    def _bias(self, value: Value, start: Tensor, stack: ExitStack) -> Tensor:
        weight = None if value.beside is None else self._start(value.beside)
        for layer, _ in value.work:
            base = layer.get_base_layer()
            stack.enter_context(put(base, layer.view.bias_name, start))
            if weight is not None:
                stack.enter_context(put(base, layer.view.name, weight))
        for layer, names in value.work if weight is not None else ():
            for name in names:
                stack.enter_context(derived(layer, name))
        for layer, names in value.work:
            found = layer.stack(names).bias()
            if found is not None and found is not layer.view.bias(layer.get_base_layer()):
                start.copy_(found)
        return start

    def _start(self, value: Value) -> Tensor:
        return self.raw(value) if value.own is None else value.own.detach().clone()

    def equal(self, one: Value, two: Value) -> bool:
        """Whether two values are the same numbers."""
        return torch.equal(self.merged(one), self.merged(two))


@contextmanager
def put(module: nn.Module, attr: str, value: Tensor) -> Iterator[None]:
    """While open, a module holds other numbers."""
    home: dict[str, Any] = module._parameters if attr in module._parameters else module._buffers
    before = home[attr]
    home[attr] = nn.Parameter(value, requires_grad=False) if home is module._parameters else value
    try:
        yield
    finally:
        home[attr] = before


@contextmanager
def derived(layer: BaseTunerLayer, name: str) -> Iterator[None]:
    """While open, an adapter has what it derives from its base weight, which is there now."""
    p = layer.adapters[name]
    before = {id(home): set(home._buffers) for home in layer._modules.values() if type(home) is BufferDict}
    if getattr(p.method.follow_base, "__func__", None) is not Method.follow_base:
        p.method.follow_base(p, layer.stack(()))
    elif getattr(p.method.derive, "__func__", None) is not Method.derive:
        loaded = [(slot.tensor, slot.tensor.clone()) for slot in layer.slots(name)]
        p.method.derive(p, layer.stack(()))
        for tensor, value in loaded:
            tensor.copy_(value)
    p.method.prepare(p)
    try:
        yield
    finally:
        p.cache.clear()
        for home in [h for h in layer._modules.values() if type(h) is BufferDict]:
            for key in set(home._buffers) - before.get(id(home), set()):
                del home[key]
