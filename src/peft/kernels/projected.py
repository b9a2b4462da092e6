"""A tensor whose gradient is projected, beside its plain form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lowrank import transformed


def projected(x: Tensor, basis: Tensor, within: bool) -> Tensor:
    """x, with the gradient and the tangent of its part within the span of a basis, or of the rest."""
    if not transformed():
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        return _Projected.apply(x, basis, within)
    inside = basis @ (basis.mT @ x)
    part = inside if within else x - inside
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
        inside = basis @ (basis.mT @ g)
        return inside if ctx.within else g - inside, None, None
