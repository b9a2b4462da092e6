"""What a node keeps of its own output, which takes no memory of its own: whoever uses the output mostly keeps it, too.

The caller may change an output in place. Torch refuses that for one that `save_for_backward` was given, so what is
given is another tensor over the same memory, and the node asks the output's own count of changes before it reads that.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 0.25  # of a gain that is divided out again: what its output was rounded to, a bias and all, grows so much
NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")

Count = tuple[Tensor, int]  # a tensor's count of changes, and what it was


def keep(out: Tensor, gain: Tensor, z: Tensor) -> tuple[Tensor, Count | None]:
    """What to save of an output gain z + b for z's sake, and its count, which holds none of its memory.

    That is z itself, without a count, where the output does not give it back as precisely as its dtype holds it, and
    where asking that would mean to wait for a device.
    """
    usual = type(out) is Tensor and out.is_cpu and out.dtype is not torch.float16 and gain.numel()
    if not usual or torch._C._len_torch_dispatch_stack() or torch.linalg.vector_norm(gain, -torch.inf).item() < LEAST:
        return z, None
    count = out.detach()
    count.data = NOTHING
    return out.data, (count, count._version)


def holds(count: Count | None) -> bool:
    """Whether nobody has changed an output in place since it was kept."""
    return count is not None and count[0]._version == count[1]
