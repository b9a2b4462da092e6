"""Many rows on a CPU: a low-rank update summed into a weight for the product, in place of into each row after it.

Letters as in `lowrank`: N rows, d in-features, k out-features, r rank. W + s B A costs 2 r d k, however many rows there
are, and s B (A x) costs 2 r (d + k) of each; the thin products move as many numbers to do as little. The sum lives for
the one product, takes less memory than two thirds of x and y, and is rounded as often as theirs is: only W of the
factors' own precision is taken, never 16-bit numbers, in which a small update would be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEW, MANY = 2.5, 1.75  # how often the numbers in W have to be saved among those of the rows, by rank
RANK = 32  # from here on the products are thick enough to count for more than what they move


def pays(rows: int, width: int, W: Tensor, r: int) -> bool:
    """Whether the sum is cheaper than thin products that touch `width` numbers of each row."""
    return W.dim() == 2 and rows * width >= W.numel() * (FEW if r < RANK else MANY)


def serves(rows: int, width: int, W: Tensor, A: Tensor) -> bool:
    """Whether the sum is taken: it `pays`, and W is torch's own dense matrix of the factors' dtype.

    The factors are as `thin.ordinary` wants them.
    """
    dense = type(W) in (Tensor, nn.Parameter) and W.dtype is A.dtype and W.is_cpu
    return dense and pays(rows, width, W, A.shape[0])


def weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale B A, (k, d)."""
    return torch.addmm(W, B, A, alpha=scale)
