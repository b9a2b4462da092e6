"""Tensors that all layers of an adapter share: one host for each, a child of the tuner under the tensor's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .host import AdapterHost
from .stack import Slot


class Shared(NamedTuple):
    """A tensor that a method makes once for a model: trained if it is a parameter, and kept in files if `saved`."""

    tensor: Tensor
    saved: bool = True


class SharedTensors(AdapterHost):
    """One shared tensor of each adapter, by adapter name."""

    _below: ClassVar[tuple[str, ...]] = ()
    merged: ClassVar[bool] = False
    merged_adapters: ClassVar[tuple[str, ...]] = ()

    def add(self, name: str, new: Shared, meta: bool = False) -> None:
        """File the tensor of an adapter; one that is trained without its numbers, if a file will bring them."""
        if isinstance(new.tensor, nn.Parameter):
            self._parameters[name] = nn.Parameter(new.tensor.to("meta")) if meta else new.tensor
            self.set_requires_grad(name, False)  # until it is activated
        else:
            self.register_buffer(name, new.tensor, persistent=new.saved)

    def tensor(self, name: str) -> Tensor:
        """The tensor of an adapter."""
        found = self._parameters.get(name)
        return self._buffers[name] if found is None else found  # type: ignore[return-value]

    def slots(self, name: str) -> list[Slot]:
        """The tensor of an adapter, if it is saved."""
        held = self._get_available_adapters() - self._non_persistent_buffers_set
        return [Slot("", name, self, name)] if name in held else []

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The tensor of an adapter, if it is trained."""
        found = self._parameters.get(name)
        return iter(() if found is None else (found,))

    def activate(self, names: tuple[str, ...], inference_mode: bool = False) -> None:
        """Train what these adapters train, and freeze the rest."""
        for name in self._get_available_adapters():
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active = names

    def delete_adapter(self, name: str, active: tuple[str, ...] = ()) -> None:
        """Forget the tensor of an adapter."""
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def _get_available_adapters(self) -> set[str]:
        return {*self._parameters, *self._buffers}

    def _set_disabled(self, disabled: bool) -> None:
        self._disabled = disabled

    def __repr__(self) -> str:
        shapes = {n: tuple(self.tensor(n).shape) for n in sorted(self._get_available_adapters())}
        return f"SharedTensors({shapes})"


def drawn(
    shape: tuple[int, ...], bound: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform in +-bound from a generator of its own, so that files may leave it out."""
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
