"""Memory for weights on the CPU: what an earlier merge has given back comes before memory that was never touched.

The first touch of a page costs more than the sum that is written into it. What was taken here returns when the last
tensor in it is gone, whoever holds it, and waits for the next merge, or the next layer that makes its weight in
evaluation; at most a tile's worth of memory waits.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import OrderedDict

import torch
from torch import Tensor


def _tile(stated: str) -> int:
    """Bytes, of a number of MiB; raises ValueError for anything else."""
    if not (stated.isdecimal() and int(stated)):
        raise ValueError(
            f"The environment variable PEFT_MERGE_TILE_MIB is {stated!r}, and should be a whole number of MiB, such as "
            "the 64 that it is where it is left out."
        )
    return int(stated) * 2**20


# bytes of what a merge may need beyond the weights, and of what may wait here
TILE_BYTES = _tile(os.environ.get("PEFT_MERGE_TILE_MIB") or "64")
SMALLEST = 64 * 2**10  # bytes; less comes from memory that is used again anyway

_lock = threading.RLock()
_waiting: OrderedDict[int, list[Tensor]] = OrderedDict()  # by size; the size that was used last comes last


def waiting() -> int:
    """Bytes that wait."""
    with _lock:
        return sum(size * len(held) for size, held in _waiting.items())


def forget(most: int = 0) -> None:
    """Let go of memory until no more than `most` bytes wait, that first which was used longest ago."""
    with _lock:
        left = waiting()
        while left > most:
            size, held = next(iter(_waiting.items()))
            held.pop()
            left -= size
            if not held:
                del _waiting[size]


def empty_like(t: Tensor, most: int) -> Tensor:
    """Memory in the form of a tensor of its own storage, with any numbers in it.

    Arguments:
        t: the tensor.
        most: bytes that may wait once this is given back; 0: it never does.
    """
    size = t.numel() * t.element_size()
    if t.device.type != "cpu" or not SMALLEST <= size <= most or not t.is_contiguous():
        return torch.empty_like(t)
    with _lock:
        held = _waiting.get(size)
        memory = held.pop() if held else torch.empty(size, dtype=torch.uint8, device="cpu")
        if held is not None and not held:
            del _waiting[size]
    view = (ctypes.c_char * size).from_address(memory.data_ptr())
    weakref.finalize(view, _back, memory, most).atexit = False  # the tensors hold the view, and the view's end says so
    return torch.frombuffer(view, dtype=t.dtype).view(t.shape)


def _back(memory: Tensor, most: int) -> None:
    size = memory.numel()
    with _lock:
        forget(most - size)
        _waiting.setdefault(size, []).append(memory)
        _waiting.move_to_end(size)
