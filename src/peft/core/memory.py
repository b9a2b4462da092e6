"""Whether a tensor's numbers are those of another time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Memory:
    """The memory of a tensor, told by its owner and not by its address, which the next tensor may have.

    It is not kept alive. A copy of this is the memory of none.
    """

    def __init__(self, t: Tensor | None = None):
        self.owner = None if t is None else StorageWeakRef(t.untyped_storage())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Memory) and self.owner is not None and self.owner == other.owner

    def __hash__(self) -> int:
        return hash(self.owner)

    def __reduce__(self) -> Any:
        return Memory, ()


def identity(t: Tensor) -> Hashable:
    """Tells a tensor's numbers from those of any other tensor and of any other time; None if that is not known."""
    if t.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return None
    return (Memory(t), t.storage_offset(), t._version, t.shape, t.device)


class Noted:
    """A value that was computed from a tensor's numbers; a copy of this holds nothing."""

    def __init__(self, t: Tensor | None = None, value: Any = None):
        self.value, self.of = value, None
        if t is not None and not t.is_inference():
            self.of = (t._version, t.data_ptr(), t.shape, t.dtype, StorageWeakRef(t.untyped_storage()))

    def holds(self, t: Tensor) -> bool:
        """Whether they are the numbers of t."""
        if self.of is None:
            return False
        version, address, shape, dtype, owner = self.of
        alike = t._version == version and t.data_ptr() == address and t.shape == shape and t.dtype is dtype
        return alike and t.untyped_storage()._cdata == owner.cdata

    def __reduce__(self) -> Any:
        return Noted, ()
