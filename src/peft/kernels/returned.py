"""What a node keeps of its own output, which takes no memory of its own: whoever uses the output mostly keeps it, too.

The caller may change an output in place. Torch refuses that for one that `save_for_backward` was given, so what is
given is another tensor over the same memory, and the node asks the output's own count of changes before it reads that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .modes import lasting

LEAST = 0.25  # of a gain that is divided out again: what its output was rounded to, a bias and all, grows so much

NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class Count(NamedTuple):
    """A tensor's count of changes, and what it was."""

    of: Tensor
    was: int

    @property
    def holds(self) -> bool:
        """Whether nobody has changed the tensor in place since."""
        return self.of._version == self.was


def serves(out: Tensor, gain: Tensor) -> bool:
    """Whether an output gain z + b gives z back as precisely as its dtype holds it; only a CPU tells without a wait."""
    if type(out) is not Tensor or not out.is_cpu or out.dtype is torch.float16 or not (gain.numel() and lasting()):
        return False
    return float(torch.linalg.vector_norm(gain, -torch.inf)) >= LEAST


def keep(out: Tensor) -> tuple[Tensor, Count]:
    """What to save of an output, and its count, which holds none of its memory."""
    count = out.detach()
    count.data = NOTHING
    return out.data, Count(count, count._version)
