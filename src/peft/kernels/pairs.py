"""Pairs of features turned and stretched, in one product with a block-diagonal matrix.

Letters: N rows of k features in groups of 2 h, feature j of a group paired with j + h; y is (N, k). A pair becomes
(c1 y1 - d1 y2, d2 y1 + c2 y2), with c = alpha cos theta and d = alpha sin theta. theta and alpha hold one number for
each pair (`each` 1), for each feature (2), or two, of which c and d take one each (4). In small groups a product with
each group's matrix, mostly zeros, takes half the time of sums and products of halves: it passes over y once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import blocks as kernel
from .again import batched, differentiable
from .modes import PLAIN, WIDE, eager, node

LARGEST = 64  # group, of which a product takes no longer than passes over its halves
SIZE = 32  # of the blocks that smaller groups are put together in
ROWS = 32  # from which on a product pays


def parts(c: Tensor, d: Tensor, half: int, each: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c1, d1, d2, c2), (..., groups, h)."""
    if each == 1:
        c, d = c.unflatten(-1, (-1, half)), d.unflatten(-1, (-1, half))
        return c, d, d, c
    if each == 2:
        (c1, c2), (d1, d2) = (t.unflatten(-1, (-1, 2, half)).unbind(-2) for t in (c, d))
    else:
        (c1, c2), (d1, d2) = (t.unflatten(-1, (-1, 2, 2, half)).select(-3, k).unbind(-2) for k, t in enumerate((c, d)))
    return c1, d1, d2, c2


def plain(y: Tensor, theta: Tensor, alpha: Tensor, half: int, each: int) -> Tensor:
    """The definition, on the last axis of y."""
    c1, d1, d2, c2 = parts(alpha * theta.cos(), alpha * theta.sin(), half, each)
    y1, y2 = y.unflatten(-1, (-1, 2, half)).unbind(-2)
    return torch.stack((c1 * y1 - d1 * y2, d2 * y1 + c2 * y2), -2).flatten(-3)


def turned(y: Tensor, theta: Tensor, alpha: Tensor, half: int, each: int) -> Tensor | None:
    """`plain` of torch's own tensors on a CPU, of one dtype, where gradients are wanted; None where another is due.

    Arguments:
        y: (..., k).
        theta, alpha: (k each / 2).
        half: h.
        each: 1, 2 or 4.
    """
    dtype = y.dtype
    if type(y) not in PLAIN or type(theta) not in PLAIN or type(alpha) not in PLAIN or half > LARGEST // 2:
        return None
    if dtype not in WIDE or theta.dtype is not dtype or alpha.dtype is not dtype or theta.dim() != 1 or y.is_nested:
        return None
    if not (y.is_cpu and theta.is_cpu and torch.is_grad_enabled() and eager()):  # graphs are for any number of rows
        return None
    if y.numel() < ROWS * y.shape[-1] or y.dim() < 2:
        return None
    return _turned(y, theta, alpha, half, each)


def _placed(blocks: Tensor, half: int) -> Tensor:
    """Where blocks (n, b, b) of whole groups hold the numbers of pairs: (n, b / 2 h, from half, to half, h), a view."""
    n, b = blocks.shape[:2]
    count = b // half // 2
    if count == 1:
        return blocks.view(n, 1, 2, half, 2, half).diagonal(0, 3, 5)
    return blocks.view(n, count, 2, half, count, 2, half).diagonal(0, 1, 4).diagonal(0, 2, 4).movedim(3, 1)


def _blocks(c: Tensor, d: Tensor, half: int, each: int, k: int) -> Tensor:
    """The matrix that rows are multiplied with, in blocks of some groups each."""
    groups = k // half // 2
    count = next(m for m in range(max(1, SIZE // half // 2), 0, -1) if groups % m == 0)
    c1, d1, d2, c2 = parts(c, d, half, each)
    blocks = c.new_zeros(groups // count, 2 * half * count, 2 * half * count)
    place = _placed(blocks, half)
    place.copy_(torch.stack((c1, d2, d1.neg(), c2), 1).view(*place.shape[:2], 2, 2, half))
    return blocks


class _Turned(torch.autograd.Function):
    """Saves y, theta, alpha and numbers in their size."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, theta: Tensor, alpha: Tensor, half: int, each: int) -> Tensor:
        cos, sin = theta.cos(), theta.sin()
        c, d = cos * alpha, sin * alpha
        blocks = _blocks(c, d, half, each, y.shape[-1])
        ctx.half, ctx.each = half, each
        ctx.save_for_backward(y, theta, alpha, cos, sin, c, d, blocks)
        return kernel.product(y, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, theta, alpha, cos, sin, c, d, blocks = ctx.saved_tensors
        needs, half, each = ctx.needs_input_grad, ctx.half, ctx.each
        if torch.is_grad_enabled() or batched(grad):
            found = differentiable(lambda y, t, a: plain(y, t, a, half, each), (y, theta, alpha), needs[:3], grad)
            return *found, None, None
        of_y = kernel.product(grad, blocks.mT) if needs[0] else None
        if not (needs[1] or needs[2]):
            return of_y, None, None, None, None
        of_blocks = kernel.of_blocks(y, grad, blocks)
        of_c, of_d = _gathered(_placed(of_blocks, half), each)
        return of_y, (of_d * c).addcmul_(of_c, d, value=-1), (of_c * cos).addcmul_(of_d, sin), None, None


def _gathered(place: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """The gradients of c and d, each in the shape of theta, from those of the numbers in their places."""
    of_c1, of_d2, of_d1, of_c2 = place.flatten(0, 1).flatten(1, 2).unbind(1)
    if each == 1:
        return (of_c1 + of_c2).view(-1), (of_d2 - of_d1).view(-1)
    of_d1 = of_d1.neg()
    if each == 2:
        return torch.stack((of_c1, of_c2), 1).view(-1), torch.stack((of_d1, of_d2), 1).view(-1)
    none = torch.zeros_like(of_d1)
    pairs = (of_c1, of_c2, none, none), (none, none, of_d1, of_d2)
    return torch.stack(pairs[0], 1).view(-1), torch.stack(pairs[1], 1).view(-1)


_turned = node(_Turned)
