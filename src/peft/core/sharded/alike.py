"""What all processes of a spread model must do alike: draw the same numbers, combine whole adapters, fail together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import OtherProcessError
from ..host import tuner_layers
from .edge import replicated
from .gather import is_mesh, is_shared, lent_back, like_first, together, whole


@contextmanager
def as_one(shared: bool) -> Iterator[None]:
    """What all processes do together: an error of one of them is raised by all, and none waits for another for ever.

    Arguments:
        shared: False where each process works for itself.

    Raises OtherProcessError where it was another one's.
    """
    error = None
    try:
        yield
    except Exception as found:
        if not shared:
            raise
        error = found
    if shared:
        told = _told(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise OtherProcessError(f"Process {rank} has failed, so this one stops too. There it was {text}")


def writes(willing: bool) -> bool:
    """Whether this process is the one that writes: the first of those that are willing."""
    ready = _told(willing)
    return willing and ready.index(True) == torch.distributed.get_rank()


def _told(fact: Any) -> list[Any]:
    """What every process says, by its rank."""
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, fact)
    return found


@contextmanager
def drawing_alike(model: nn.Module) -> Iterator[None]:
    """Inside, random numbers are those that the first process of the mesh draws, if the model lies on one."""
    parameters: Iterator[Any] = model.parameters()
    mesh = next((p.device_mesh for p in parameters if is_mesh(p)), None) if together() else None
    if mesh is None:
        yield
        return
    kind = mesh.device_type
    sources: list[Any] = [torch] if kind == "cpu" else [torch, getattr(torch, kind)]
    own = [of.get_rng_state() for of in sources]
    wanted = [_of_first(state, mesh) for state in own]
    for of, state in zip(sources, wanted, strict=True):
        of.set_rng_state(state)
    try:
        yield
    finally:  # a process that draws as the first one does goes on so: dropout must drop the same
        for of, mine, state in zip(sources, own, wanted, strict=True):
            if not torch.equal(mine, state):
                of.set_rng_state(mine)


def _of_first(state: torch.Tensor, mesh: Any) -> torch.Tensor:
    return like_first(state, mesh, replicated(mesh)).to_local().cpu()  # type: ignore[attr-defined]


@contextmanager
def adapters_whole(model: nn.Module) -> Iterator[None]:
    """Inside, what adapters hold is whole on every process, and base weights lie as they lay."""
    if not together():
        yield
        return
    lent_back(model)
    if not is_shared(model):
        yield
        return
    with whole(_of_adapters(model)), drawing_alike(model):
        yield


def _of_adapters(model: nn.Module) -> Iterable[nn.Module]:
    """The modules that hold tensors of adapters."""
    found: dict[int, nn.Module] = {}
    for _, layer in tuner_layers(model):
        found.update((id(m), m) for m in layer.holders())
    return found.values()
