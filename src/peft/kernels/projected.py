"""A tensor whose gradient is projected, beside its plain form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank import transformed

Held = tuple[Tensor, bool]  # a basis, and whether gradients stay within its span
Parts = tuple[Tensor, Tensor, Tensor]


def projected(x: Tensor, basis: Tensor, within: bool) -> Tensor:
    """x, with the gradient and the tangent of its part within the span of a basis, or of the rest."""
    if not transformed():
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        return _Projected.apply(x, basis, within)
    part = _part(x, basis, within)
    return x.detach() + (part - part.detach())


class _Projected(torch.autograd.Function):
    """x, whose gradient keeps what lies in the span of a basis (n, k), or in its complement."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, basis: Tensor, within: bool) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.within = within
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (basis,) = ctx.saved_tensors
        return _part(g, basis, ctx.within), None, None


def beside(x: Tensor, W: Tensor, b: Tensor | None, new: Parts, old: Parts, bases: tuple[Held, Held]) -> Tensor:
    """W x + b + (B diag(g) A - B0 diag(g0) A0) x, (..., k), in the dtype of x, for parts (A, B, g).

    Shapes: x (..., d), A (r, d), B (k, r), g (r,). The gradient of A is projected among its d features, that of B among
    its k. It is for training without transforms.
    """
    (A, B, g), (A0, B0, g0) = new, old
    flat = x.reshape(-1, x.shape[-1])
    z = _Thin.apply(_Thin.apply(flat, A, *bases[0], True) * g, B, *bases[1], False)
    z = z - F.linear(F.linear(flat.to(A0.dtype), A0) * g0, B0)
    y = F.linear(x, W, b)
    return (y + z.view(y.shape)).to(y.dtype)


class _Thin(torch.autograd.Function):
    """W x in the dtype of W, whose gradient is projected among the features that go in, or come out.

    It is a sum of as many outer products as x has rows: where they are few, these are projected in its place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, basis: Tensor, within: bool, at_input: bool) -> Tensor:
        ctx.save_for_backward(x, W, basis)
        ctx.within, ctx.at_input = within, at_input
        return F.linear(x.to(W.dtype), W)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, W, basis = ctx.saved_tensors
        within, at_input = ctx.within, ctx.at_input
        down = None
        if ctx.needs_input_grad[0]:  # whose own derivatives are projected, too
            across = projected(W.mT, basis, within).mT if at_input else projected(W, basis, within)
            down = (g @ across).to(x.dtype)
        if not ctx.needs_input_grad[1]:
            return down, None, None, None, None
        x = x.to(W.dtype)
        if x.shape[0] >= min(W.shape):
            D = x.mT @ g if at_input else g.mT @ x
            D = _part(D, basis, within)
        else:
            rows, other = (x, g) if at_input else (g, x)
            D = _part(rows.mT, basis, within) @ other
        return down, (D.mT if at_input else D), None, None, None


def _part(x: Tensor, basis: Tensor, within: bool) -> Tensor:
    """What of x (n, m) lies in the span of a basis (n, k), or in its complement."""
    inside = basis @ (basis.mT @ x)
    return inside if within else x - inside
