"""Rotations made of learnt numbers, and rows turned by them.

Letters: n blocks of size b; t is (..., n b); what is learnt is held as (n, b (b - 1) / 2), the numbers of skew matrices
Q above the diagonal. In training on a CPU the way from these numbers to turned rows is one node of the graph, whose
gradients take a third of the operations: each fetches its code anew after the base's product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import blocks as kernel
from .again import batched, differentiable
from .modes import NARROW, PLAIN, WIDE, eager, exported, node, once


def skew(held: Tensor, n: int) -> Tensor:
    """The skew matrices, (..., n, n), of their numbers above the diagonal, row by row."""
    row, column = torch.triu_indices(n, n, 1, device=held.device)
    upper = held.new_zeros(*held.shape[:-1], n * n).index_copy(-1, row * n + column, held).unflatten(-1, (n, n))
    return upper - upper.mT


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1, orthogonal for a skew Q, (..., b, b)."""
    Q = Q.float() if Q.dtype in NARROW else Q
    one = kernel.one(Q)
    if exported():
        return _eliminated(one + Q, one - Q, one)
    # the two commute; I + Q has an inverse always, and to look whether it has would wait for a GPU
    return torch.linalg.solve_ex(one + Q, one - Q)[0]


def _eliminated(M: Tensor, X: Tensor, one: Tensor) -> Tensor:
    """M^-1 X, step by step; no pivot of I and a skew matrix is below one."""
    both, b = torch.cat([M, X], -1), M.shape[-1]
    for k in range(b):
        row = both[..., k : k + 1, :] / both[..., k : k + 1, k : k + 1]
        both = both - (both[..., k : k + 1] - one[..., k : k + 1]) * row
    return both[..., b:]


def series(Q: Tensor, terms: int) -> Tensor:
    """The first terms of (I + Q) (I - Q)^-1; of three terms the last is a cube, as files are trained for it."""
    one = kernel.one(Q).expand_as(Q)
    if terms == 5:  # the usual number, with a product less
        square = Q @ Q
        return (one + 2 * Q) + square @ (2 * (one + Q) + square)
    if terms < 3:
        return one + 2 * Q if terms == 2 else one
    power, total = Q, one + 2 * Q
    for _ in range(2, max(terms, 4) - 1):
        power = power @ Q
        total = total + 2 * power
    return total + power @ Q


def plain(t: Tensor, held: Tensor, b: int, terms: int) -> Tensor:
    """The definition: t R on the last axis of t; `terms` of the series, 0 for the exact rotation."""
    Q = skew(held, b)
    return kernel.plain(t, series(Q, terms) if terms else cayley(Q))


def turned(t: Tensor, held: Tensor, b: int, terms: int) -> Tensor | None:
    """`plain` of torch's own tensors on a CPU, of one dtype, where gradients are wanted; None where another is due.

    Arguments:
        t: (..., n b).
        held: (n, b (b - 1) / 2).
        b: the size of a block.
        terms: of the series, 0 for the exact rotation.
    """
    if type(t) not in PLAIN or type(held) not in PLAIN or held.dim() != 2 or terms not in (0, 5):
        return None
    if t.dtype not in WIDE or held.dtype is not t.dtype or t.is_nested or held.shape[0] * b != t.shape[-1]:
        return None
    if not (t.is_cpu and held.is_cpu and torch.is_grad_enabled()) or b < kernel.BROAD // 2 or not t.numel():
        return None
    if not eager():
        return None
    return _turned(t, held, b, terms)


@once
def _above(b: int) -> Tensor:
    """The places above the diagonal of a (b, b) matrix, row by row."""
    with torch.inference_mode(False):
        row, column = torch.triu_indices(b, b, 1, device="cpu")
        return row * b + column


class _Turned(torch.autograd.Function):
    """Saves t, what is learnt, the rotations and matrices in their size that they are made of."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, held: Tensor, b: int, terms: int) -> Tensor:
        ctx.b, ctx.terms = b, terms
        upper = held.new_zeros(held.shape[0], b * b).index_copy_(1, _above(b), held).view(-1, b, b)
        Q, one = upper - upper.mT, kernel.one(upper)
        if terms:
            double, square = torch.add(one, Q, alpha=2), torch.bmm(Q, Q)
            rest = double + square + one
            R = torch.baddbmm(double, square, rest)
            made: tuple[Tensor, ...] = (Q, square, rest)
        else:
            inverse = torch.linalg.inv(one + Q)
            R = torch.sub(inverse + inverse, one)  # (I - Q) = 2 I - (I + Q)
            made = (inverse,)
        ctx.save_for_backward(t, held, R, *made)
        return kernel.product(t, R)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        t, held, R, *made = ctx.saved_tensors
        needs, b = ctx.needs_input_grad, ctx.b
        if torch.is_grad_enabled() or batched(grad):
            found = differentiable(lambda t, q: plain(t, q, b, ctx.terms), (t, held), needs[:2], grad)
            return *found, None, None
        of_t = kernel.product(grad, R.mT) if needs[0] else None
        if not needs[1]:
            return of_t, None, None, None
        G = kernel.of_blocks(t, grad, R)
        of_Q = _through_series(G, *made) if ctx.terms else _through_inverse(G, *made)
        return of_t, (of_Q - of_Q.mT).view(-1, b * b).index_select(1, _above(b)), None, None


def _through_series(G: Tensor, Q: Tensor, square: Tensor, rest: Tensor) -> Tensor:
    """The gradient of Q from that of (I + 2 Q) + Q^2 (2 I + 2 Q + Q^2)."""
    of_rest = torch.bmm(square, G)  # which is symmetric
    of_square = torch.baddbmm(of_rest, G, rest.mT)
    return torch.baddbmm(of_rest.add_(G), of_square, Q.mT, beta=2).baddbmm_(Q.mT, of_square)


def _through_inverse(G: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of Q from that of 2 (I + Q)^-1 - I."""
    return torch.baddbmm(G, torch.bmm(inverse.mT, G), inverse.mT, beta=0, alpha=-2)


_turned = node(_Turned)
