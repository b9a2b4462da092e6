"""Tensors of adapters that are no parameters, by adapter name; what tensors lie below a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import sharded


class BufferDict(nn.Module):
    """Tensors by adapter name that move with the module and are not saved, but for those that ask for it."""

    saved = False

    def _get_name(self) -> str:
        return BufferDict.__name__

    def extra_repr(self) -> str:
        return listed(self._buffers)

    def hold(self, name: str, value: Tensor) -> None:
        """Take an adapter's tensor, saved if it is an `nn.Buffer`; other adapters may have chosen otherwise."""
        self.register_buffer(name, value, persistent=isinstance(value, nn.Buffer))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BufferDict:
        with outliving(self, fn):
            return super()._apply(fn, recurse)

    def unsaved(self, name: str) -> bool:
        """Whether it holds a tensor of this adapter that files leave out."""
        return name in self._buffers and name in self._non_persistent_buffers_set

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=self.saved)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]
        self._non_persistent_buffers_set.discard(name)

    def __len__(self) -> int:
        return len(self._buffers)


class SavedBuffers(BufferDict):
    """Tensors by adapter name that are not trained, and saved."""

    saved = True


@contextmanager
def outliving(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While torch applies `fn` to a module's tensors: `to_empty` leaves memory that nobody has written, and what no
    file brings would have no numbers then; it keeps them. `to_empty` calls nothing else of the modules inside."""
    emptied = getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
    unsaved = module._non_persistent_buffers_set if emptied else ()
    held = {n: t for n, t in module._buffers.items() if n in unsaved and t is not None}
    yield
    for name, t in held.items():  # one without numbers is told by its device
        empty = module._buffers[name]
        module._buffers[name] = t if t.is_meta or empty is None else t.to(empty.device)


def listed(tensors: Mapping[str, Tensor | None]) -> str:
    """A line for each, as torch prints a dictionary of parameters."""
    return "\n".join(f"  ({k}): {_shown(t)}" for k, t in tensors.items() if t is not None)


def _shown(t: Tensor) -> str:
    kind = "Parameter" if isinstance(t, nn.Parameter) else "Buffer"
    where = f" (GPU {t.get_device()})" if t.is_cuda else ""
    return f"{kind} containing: [{torch.typename(t)} of size {'x'.join(map(str, t.shape))}{where}]"


def tensors_below(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, dotted name, attribute) of every parameter and persistent buffer below a module."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            own = [("", module, name)]
            for below, owner, attr in sharded.laid_into(parameter) or own:
                yield owner, f"{prefix}{below}{attr}", attr
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield module, prefix + name, name
    for name, child in module._modules.items():
        if child is not None:
            yield from tensors_below(child, f"{prefix}{name}.")
