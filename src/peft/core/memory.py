"""Whether a tensor's numbers are those of another time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..kernels.modes import PLAIN, transformed

VECTOR = 16  # bytes; BLAS reads operands that start elsewhere in another order


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


def aligned(t: Tensor) -> Tensor:
    """t, or a copy where it does not start at a full vector, as in pages of a file: products round otherwise there."""
    if type(t) not in PLAIN or not t.is_cpu or torch.is_grad_enabled() or transformed():
        return t
    return t.clone() if t.data_ptr() % VECTOR else t
