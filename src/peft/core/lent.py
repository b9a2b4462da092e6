"""The memory of a dense weight: other memory may take its place, so that the old one stays as it is."""

from __future__ import annotations

from torch import Tensor, nn

from . import storage
from .storage import Storage


def own(base: nn.Module, name: str, like: Tensor | None = None) -> bool:
    """Whether a parameter's memory is dense and all its own, so that other memory may take its place.

    Arguments:
        base: the module.
        name: of the parameter.
        like: what would take its place, in shape, dtype and device.
    """
    held = base._parameters.get(name)
    if type(held) is not nn.Parameter or not held.is_floating_point() or type(held.data) is not Tensor:
        return False
    if held.is_meta or type(storage.of(base, name)) is not Storage:
        return False
    if like is not None and (like.shape, like.dtype, like.device) != (held.shape, held.dtype, held.device):
        return False
    memory = held.untyped_storage()
    if held.device.type == "cpu" and memory.is_shared():
        return False
    return memory.nbytes() == held.numel() * held.element_size()


def put(base: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter other numbers; memory that is its own is not written into."""
    if own(base, name):
        held: Tensor = getattr(base, name)
        held.data = value.detach().to(held.device, held.dtype, copy=True)
    else:
        storage.of(base, name).write(base, name, value)


def alike(one: Tensor, two: Tensor) -> bool:
    """Whether one can stand in the other's place as it is."""
    form = one.shape == two.shape and one.stride() == two.stride() and one.dtype is two.dtype
    return form and type(one) is Tensor and one.device == two.device and not one.requires_grad


def same_memory(one: Tensor, two: Tensor) -> bool:
    """Whether writing into one may change the other."""
    return one.untyped_storage()._cdata == two.untyped_storage()._cdata
