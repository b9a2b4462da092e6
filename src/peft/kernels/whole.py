"""Many rows on a CPU: a low-rank update summed into a weight for the product, in place of into each row after it.

Letters as in `lowrank`: N rows, d in-features, k out-features, r rank. W + s B A costs 2 r d k, however many rows there
are, and s B (A x) costs 2 r (d + k) of each; the thin products move as many numbers to do as little. The sum lives for
the one product, takes no more memory than two thirds of x and y, and is rounded as often as theirs is: only W of the
factors' own precision is taken, never 16-bit numbers, in which a small update would be lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

REACH = 1.5  # how often the numbers in W have to be saved among those of the rows


def reach(W: Tensor, A: Tensor) -> float:
    """From how many numbers of rows on, as thin products touch them, the sum is cheaper; infinity if it is not taken.

    It is taken where W is torch's own dense matrix of the factors' dtype; they are as `thin.ordinary` wants them.
    """
    if (type(W) is nn.Parameter or type(W) is Tensor) and W.dtype is A.dtype and W.is_cpu and W.dim() == 2:
        return W.numel() * REACH
    return math.inf


def touched(x: Tensor, W: Tensor) -> int:
    """How many numbers the rows of x (..., d) and of its product with W hold together."""
    return x.numel() // max(x.shape[-1], 1) * sum(W.shape)


def serves(rows: int, width: int, W: Tensor, A: Tensor) -> bool:
    """Whether the sum is taken for so many rows, of which thin products touch `width` numbers each."""
    return rows * width >= reach(W, A)


def weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale B A, (k, d)."""
    return torch.addmm(W, B, A, alpha=scale)
