"""What programs read of a tuner layer beside its weight: its sizes, how the weight is stored, and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import storage
from .stack import Values
from .views.linear import LinearView, TransposedView


class Told:
    """What is worked out when it is asked for, unless an instance has a value of its own, as of programs' classes."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work, self.__doc__ = work, work.__doc__

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        return self if layer is None else self.work(layer)


class Public(nn.Module):
    """Names that callers know; the layer itself does not use them."""

    view: LinearView
    adapters: dict[str, Any]
    other_param_names: tuple[str, ...]
    merged: Any
    get_base_layer: Any
    _active: Any
    _disabled: Any
    _replan: Any
    _set_disabled: Any
    follow_base: Any
    _home_order: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give each plain value that the layer names an attribute that can be read and set as a whole."""
        super().__init_subclass__(**kwargs)
        for name in cls.other_param_names:
            if name not in cls._home_order and not hasattr(cls, name):
                setattr(cls, name, _of_all(name))

    @property
    def _active_adapter(self) -> list[str]:
        return list(self._active)

    @_active_adapter.setter
    def _active_adapter(self, names: str | list[str]) -> None:
        self._active = (names,) if isinstance(names, str) else tuple(names)
        self._replan()

    @property
    def _disable_adapters(self) -> bool:
        return bool(self._disabled)

    @_disable_adapters.setter
    def _disable_adapters(self, disabled: bool) -> None:
        self._set_disabled(disabled)

    @Told
    def in_features(self) -> int | None:
        """How many numbers the layer takes: features, channels, or words of an embedding; None if it is no W x + b."""
        base = self.get_base_layer()
        found = getattr(base, "in_features", getattr(base, "in_channels", None))
        return (self.view.shape(base) or (None,))[-1] if found is None else found

    @Told
    def out_features(self) -> int | None:
        """How many numbers the layer gives; None if it is no W x + b."""
        base = self.get_base_layer()
        found = getattr(base, "out_features", getattr(base, "out_channels", None))
        return (self.view.shape(base) or (None, None))[-2] if found is None else found

    @Told
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in, out), and with it what `get_delta_weight` gives."""
        return isinstance(self.view, TransposedView) and not self.view.one_hot

    def get_base_weight(self) -> Tensor:
        """The numbers of the weight as it is now, in its own shape, without a gradient.

        Those of a dense weight are the weight's own memory, those of a quantised one are made anew.
        """
        base = self.get_base_layer()
        kind = storage.packed(base, self.view.name)
        with torch.no_grad():
            return getattr(base, self.view.name).data if kind is None else kind.read(base, self.view.name).detach()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put other numbers in place of the base weight's; what adapters derive from them follows.

        Arguments:
            weight_data: of the weight's own shape; a quantised weight rounds them.

        Raises ValueError for another shape, and while an adapter is merged into the weight.
        """
        base, name = self.get_base_layer(), self.view.name
        shape = tuple(self.get_base_weight().shape)
        if tuple(weight_data.shape) != shape:
            raise ValueError(f"The base weight has the shape {shape}; weight_data has {tuple(weight_data.shape)}.")
        if self.merged:
            raise ValueError(
                "An adapter is merged into this weight, so unmerging would undo what is set. Call unmerge() first."
            )
        kind = storage.packed(base, name)
        if kind is None:
            getattr(base, name).data = weight_data
        else:
            kind.write(base, name, weight_data)
        self.follow_base()


def _of_all(name: str) -> property:
    """A plain value of every adapter, by adapter name."""

    def read(layer: Any) -> Any:
        home = layer._modules.get(name)
        return Values(layer, name) if home is None else home

    def write(layer: Any, values: Mapping[str, Any]) -> None:
        own = Values(layer, name)
        for adapter, value in values.items():
            own[adapter] = value

    return property(read, write)
