"""Over a weight in half precision, with factors in float32, where no gradient is wanted.

Letters as in `lowrank`: x (..., d), W (k, d), A (r, d), B (k, r). The base's product is `F.linear`, as the base
takes it. What is added to it is summed in float32 and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import thin
from .modes import transformed


def row(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W x + b + scale B A x, (..., k), in the dtype of x, which has one row."""
    y = F.linear(x, W, b)
    h = A.mv(x.view(-1).to(A.dtype))
    return y.view(-1).to(A.dtype).addmv_(B, h, alpha=scale).to(x.dtype).view(y.shape)


def gained(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, gain: Tensor, B: Tensor) -> Tensor:
    """gain (W x) + b + B A x, (..., k), in the dtype of x, for a gain of (k,); of a gain of 1 the base's W x + b.

    x may have any number of rows.
    """
    y, plain = F.linear(x, W, b), not x.is_cpu or transformed()
    if x.numel() == x.shape[-1] and not plain:
        h = A.mv(x.view(-1).to(A.dtype))
        return _times(y.view(-1).to(A.dtype), b, gain).addmv_(B, h).to(x.dtype).view(y.shape)
    flat, rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if plain or y.numel() <= thin.ONE:
        h = F.linear(flat.to(A.dtype), A) if plain else thin.down(flat, A, 0.0)[0]
        return _times(rows.to(A.dtype), b, gain).addmm_(h, B.mT).to(x.dtype).view(y.shape)
    h = thin.down(flat, A, 0.0)[0]
    for some in thin.blocks(*rows.shape):  # y is nobody else's
        rows[some].copy_(_times(rows[some].to(A.dtype), b, gain).addmm_(h[some], B.mT))
    return y


def _times(y: Tensor, b: Tensor | None, gain: Tensor) -> Tensor:
    """gain (y - b) + b of a y that may be changed."""
    return y.mul_(gain) if b is None else torch.addcmul(b.to(y.dtype), y.sub_(b), gain)
