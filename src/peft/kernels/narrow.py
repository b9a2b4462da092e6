"""A low-rank update beside an output in half precision, with factors in float32, where no gradient is wanted.

Letters as in `lowrank`: x (..., d), W (k, d), y (..., k), A (r, d), B (k, r). What is added is summed in float32 and
rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import thin
from .modes import changed, transformed


def row(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W x + b + scale B A x, (..., k), in the dtype of x, which has one row."""
    return one(F.linear(x, W, b), x, A, B, scale)


def gained(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, gain: Tensor, B: Tensor) -> Tensor:
    """gain (W x) + b + B A x, (..., k), in the dtype of x, for a gain of (k,); of a gain of 1 the base's W x + b."""
    return beside(F.linear(x, W, b), x, A, B, 1.0, gain, b, own=True)


def beside(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    gain: Tensor | None = None,
    b: Tensor | None = None,
    own: bool = False,
) -> Tensor:
    """y + scale B A x in the dtype of y, or the same of gain (y - b) + b; in y's memory if that is the caller's own."""
    plain = not x.is_cpu or transformed()
    if x.numel() == x.shape[-1] and not plain:
        return one(y, x, A, B, scale, gain, b)
    flat, rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    h = F.linear(flat.to(A.dtype), A) if plain else thin.down(flat, A, 0.0)[0]
    if gain is None:
        return thin.onto(rows, h, B, scale, own).view(y.shape)
    return times(rows, h, B, scale, gain, b, own, plain).view(y.shape)


def times(
    y: Tensor,
    h: Tensor,
    B: Tensor,
    scale: float,
    gain: Tensor,
    b: Tensor | None,
    own: bool = False,
    plain: bool = False,
) -> Tensor:
    """gain (y - b) + b + scale B h of rows (N, k), in the dtype of y; in y's memory if that is the caller's own."""
    if plain or y.numel() <= thin.ONE:
        return changed(_times(y.to(h.dtype), gain, b), "addmm", h, B.mT, alpha=scale).to(y.dtype)
    out = y if own else torch.empty_like(y)
    for some in thin.blocks(*y.shape):
        out[some].copy_(changed(_times(y[some].to(h.dtype), gain, b), "addmm", h[some], B.mT, alpha=scale))
    return out


def one(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, gain: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """`beside` of one row on a CPU, outside graphs."""
    h, u = A.mv(x.reshape(-1).to(A.dtype)), y.reshape(-1).to(A.dtype)
    u = u if gain is None else _times(u, gain, b)
    return torch.addmv(u, B, h, alpha=scale).to(y.dtype).view(y.shape)


def _times(y: Tensor, gain: Tensor, b: Tensor | None) -> Tensor:
    """gain (y - b) + b, in memory of its own."""
    return y * gain if b is None else torch.addcmul(b.to(y.dtype), y - b, gain)
