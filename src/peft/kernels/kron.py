"""A Kronecker product as an update, s (W1 (x) W2) x, which is never built.

Letters: x (..., i1 i2), W1 (o1, i1), W2 (o2, i2), y (..., o1 o2). With x as a matrix of (i1, i2) the update is
s W1 x W2'. What stands between the two products is as large as the input, and made again in the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .again import differentiable
from .modes import NARROW, WIDE, changed, node, shaped, transformed, without_autocast


def add(y: Tensor, x: Tensor, W1: Tensor, W2: Tensor, s: Any) -> Tensor:
    """y + s (W1 (x) W2) x, in the dtype of y."""
    kinds = {type(y), type(x)} == {Tensor} and W1.dtype in WIDE and y.dtype in (W1.dtype, *NARROW)
    if not kinds or type(s) is not float or transformed() or not torch.is_grad_enabled() or not x.numel():
        return plain(y, x, W1, W2, s)
    with without_autocast(x):
        return _add(y, x.to(y.dtype), W1.to(W2.dtype), W2, s)


def plain(y: Tensor, x: Tensor, W1: Tensor, W2: Tensor, s: Any) -> Tensor:
    """The definition."""
    h = x.to(W1.dtype).unflatten(-1, (W1.shape[1], W2.shape[1]))
    return (y + ((W1 * s) @ (h @ W2.mT)).flatten(-2)).to(y.dtype)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """The dimension as a product: by the factor if it divides, else by divisors near the root and below the factor."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = factor if factor > 0 else dimension
    small = max(d for d in range(1, math.isqrt(dimension) + 1) if dimension % d == 0 and (d <= limit or d == 1))
    return small, dimension // small


def across(h: Tensor, W1: Tensor, axes: int) -> Tensor:
    """W1 over the first of two factors of the channels of h, (..., i1 o2, places): (..., o1 o2, places).

    Arguments:
        axes: how many axes the places have.
    """
    axis = h.dim() - axes - 1
    parts = h.unflatten(axis, (W1.shape[1], -1))
    mixed: Tensor = W1 @ parts.flatten(axis + 1)
    return mixed.unflatten(-1, parts.shape[axis + 1 :]).flatten(axis, axis + 1)


def _parts(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """x as matrices, (N, i1, i2), in the dtype of the factors."""
    return x.to(W1.dtype).reshape(-1, W1.shape[1], W2.shape[1])


def _across(a: Tensor, b: Tensor, s: float, like: Tensor) -> Tensor:
    """s times the sum over n of a[n] b[n]', of (n, p, q) and (n, r, q); `like` is any tensor of its shape and dtype."""
    left, right = a.transpose(0, 1).reshape(a.shape[1], -1), b.transpose(0, 1).reshape(b.shape[1], -1)
    return torch.addmm(like, left, right.t(), beta=0, alpha=s)


class _Add(torch.autograd.Function):
    """Saves x, W1 and W2."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, W1: Tensor, W2: Tensor, s: float) -> Tensor:
        ctx.scale, scaled = s, W1 * s
        ctx.save_for_backward(x, W1, scaled, W2)
        found = scaled @ (_parts(x, W1, W2) @ W2.t())
        return shaped(changed(found.view(-1, y.shape[-1]), "add", y.reshape(-1, y.shape[-1])).to(y.dtype), y.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W1, scaled, W2 = ctx.saved_tensors
        s, (of_y, *needs, _) = ctx.scale, ctx.needs_input_grad
        passed = grad if of_y else None
        if torch.is_grad_enabled():
            zeros = torch.zeros_like(grad)
            found = differentiable(lambda x, W1, W2: plain(zeros, x, W1, W2, s), (x, W1, W2), needs, grad)
            return passed, *found, None
        g, x_ = grad.to(W1.dtype).reshape(-1, W1.shape[0], W2.shape[0]), _parts(x, W1, W2)
        back = scaled.t() @ g
        of_x = (back @ W2).to(x.dtype).view(x.shape) if needs[0] else None
        of_W1 = _across(g, x_ @ W2.t(), s, W1) if needs[1] else None
        of_W2 = back.view(-1, W2.shape[0]).t() @ x_.reshape(-1, W2.shape[1]) if needs[2] else None
        return passed, of_x, of_W1, of_W2, None


_add = node(_Add)
