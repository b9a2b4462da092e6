"""Tensors that all layers of an adapter share: one host for each, a child of the tuner under the tensor's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .buffers import listed, outliving
from .cells import celled
from .host import AdapterHost
from .lent import same_memory
from .onload import onload_layer
from .sharded.gather import full
from .stack import Slot
from .views import LinearView


class Shared(NamedTuple):
    """A tensor that a method makes once for a model: trained if it is a parameter, and kept in files if `saved`."""

    tensor: Tensor
    saved: bool = True


class Sight(NamedTuple):
    """One target before the adapter is made: path, module and view, and the tuner layer that stands there if any."""

    path: str
    module: nn.Module
    view: LinearView
    layer: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., O, I)."""
        return self.view.shape(self.module)

    def weight(self) -> Tensor:
        """The base weight without any merged adapter, (..., O, I), whole."""
        sample = self.view.sample(self.module)
        if sample is not None and sample.is_meta and is_late():  # what lies elsewhere is not brought in for its shape
            return self.view.read(self.module)
        if self.layer is not None:
            found: Tensor = self.layer.original_weight()
            return found
        with onload_layer(self.module, write=False):
            return full(self.view.read(self.module))


class SharedTensors(AdapterHost):
    """One shared tensor of each adapter, by adapter name."""

    place: torch.device | None = None  # where the layers are that read the last one added, if that is known

    def __init__(self) -> None:
        super().__init__()
        celled(self)

    def add(self, name: str, new: Shared, place: torch.device | None, meta: bool = False) -> None:
        """File the tensor of an adapter; `meta`: one that is trained without its numbers, as they are still to come."""
        self.__dict__["place"] = place
        if isinstance(new.tensor, nn.Parameter):
            self._parameters[name] = nn.Parameter(new.tensor.to("meta")) if meta else new.tensor
            self.set_requires_grad(name, False)  # until it is activated
        else:
            self._buffers[name] = new.tensor  # `register_buffer` refuses names of this class's own attributes
            if not new.saved:
                self._non_persistent_buffers_set.add(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor of an adapter."""
        found = self._parameters[name] if name in self._parameters else None  # noqa: SIM401 so asked, ZeRO-3 gathers it
        return self._buffers[name] if found is None else found  # type: ignore[return-value]

    def part(self, name: str) -> None:
        """Give an adapter memory of its own, so that to write its numbers changes no other's."""
        held = self._buffers.get(name)
        if held is not None and any(same_memory(held, t) for t in self._others(name)):
            self._buffers[name] = held.clone()

    def join(self, name: str) -> None:
        """Keep the tensor of an adapter and an equal one of another once."""
        held = self._buffers.get(name)
        if held is not None:
            self._buffers[name] = next((t for t in self._others(name) if t is held or same(t, held)), held)

    def _others(self, name: str) -> Iterator[Tensor]:
        return (t for n, t in self._buffers.items() if n != name and t is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedTensors:
        """Move or cast the tensors; those that adapters have in common stay one."""
        seen: dict[Any, str] = {}
        held = {n: t for n, t in self._buffers.items() if t is not None}
        first = {n: seen.setdefault((t.untyped_storage()._cdata, t.shape), n) for n, t in held.items()}
        with outliving(self, fn):
            super()._apply(fn, recurse)
        for n, one in first.items():
            self._buffers[n] = self._buffers[one]
        return self

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

    def _get_name(self) -> str:
        return "BufferDict" if self._buffers else "ParameterDict"

    def extra_repr(self) -> str:
        return listed({**self._parameters, **self._buffers})


def part(places: Iterable[Any]) -> None:
    """See `SharedTensors.part`, for those of the places (`owner`, `attr`) that are to be written that are shared."""
    for place in places:
        if isinstance(place.owner, SharedTensors):
            place.owner.part(place.attr)


class SharedGroup(nn.Module):
    """Shared tensors whose names begin alike: `x.0` and `x.1` are the children "0" and "1" of the tuner's child `x`."""

    def _get_name(self) -> str:
        return nn.ModuleDict.__name__


def shared_of(tuner: nn.Module) -> Iterator[tuple[str, SharedTensors]]:
    """(name, tensors) of all that the layers of a tuner share."""
    for name, child in tuner._modules.items():
        if isinstance(child, SharedTensors):
            yield name, child
        elif isinstance(child, SharedGroup):
            yield from ((f"{name}.{leaf}", home) for leaf, home in child._modules.items())  # type: ignore[misc]


def shared_home(tuner: nn.Module, name: str, undo: list[Callable[[], Any]]) -> SharedTensors:
    """Where a shared tensor of that name is filed, made if need be; `undo` receives what takes that back."""
    group, _, leaf = name.rpartition(".")
    homes: Any = tuner._modules
    if group:
        homes = _made(homes, group, SharedGroup, undo)._modules
    return _made(homes, leaf, SharedTensors, undo)


def _made(homes: Any, name: str, kind: type[nn.Module], undo: list[Callable[[], Any]]) -> Any:
    if name not in homes:
        homes[name] = kind()
        undo.append(partial(homes.pop, name))
    return homes[name]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, so that one of them is enough."""
    return one.device == other.device and one.dtype is other.dtype and not one.is_meta and torch.equal(one, other)


def on(place: torch.device | None, t: Tensor) -> Tensor:
    """A tensor on a device, if that is known; one whose numbers are still to come stays on the meta device."""
    return t if t.is_meta or place is None else t.to(place)


def beside(
    made: Mapping[str, Shared], place: torch.device | None, dtype: torch.dtype | None, known: Mapping[str, Tensor]
) -> dict[str, Shared]:
    """Shared tensors where the layers are that read them, so that no forward has to fetch them.

    Arguments:
        made: the tensors by name.
        place: the device; None: they stay where they are.
        dtype: which floating-point ones are rounded to; None: none.
        known: what another adapter shares; its tensors take the place of equal ones that are not trained.
    """
    found = {}
    for key, (t, saved) in made.items():
        moved = on(place, t.detach()).to(t.dtype if dtype is None or not t.is_floating_point() else dtype)
        if moved.dtype is not t.dtype or moved.device != t.device:
            t = nn.Parameter(moved) if isinstance(t, nn.Parameter) else moved
        if not isinstance(t, nn.Parameter) and key in known and same(known[key], t):
            t = known[key]
        found[key] = Shared(t, saved)
    return found


def unwritten(*shape: int) -> Tensor:
    """A float32 tensor for first values."""
    return torch.empty(shape, dtype=torch.float32, device=seeded_on())


def drawn(
    shape: tuple[int, ...], bound: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform in +-bound from a generator of its own, so that files may leave it out."""
    return torch.empty(shape, dtype=dtype, device=seeded_on()).uniform_(-bound, bound, generator=generator)


# When they are made -----------------------------------------------------------------------------------------

_late: ContextVar[bool] = ContextVar("late", default=False)


@contextmanager
def late() -> Iterator[None]:
    """While open, adapters on the meta device get nothing else either, until `complete` is called."""
    token = _late.set(True)
    try:
        yield
    finally:
        _late.reset(token)


def is_late() -> bool:
    """Whether what would be drawn now is to have no numbers yet."""
    return _late.get()


def seeded_on() -> torch.device:
    """Where numbers are drawn from a seed."""
    return torch.device("meta" if _late.get() else "cpu")
