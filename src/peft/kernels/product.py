"""A product of three tensors, two of them learnt, that keeps its factors for the backward pass and nothing more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lowrank import transformed


def scaled_rows(scale: Tensor, A: Tensor, gains: Tensor) -> Tensor:
    """scale[r, n] A[r] gains[n]: (..., r, n, m) of A (r, m), which is frozen, scale (..., r, n), gains (..., n, m)."""
    if transformed() or not torch.is_grad_enabled():
        return plain(scale, A, gains)
    return _ScaledRows.apply(scale, A, gains)


def plain(scale: Tensor, A: Tensor, gains: Tensor) -> Tensor:
    """The definition."""
    return scale[..., None] * A[:, None] * gains[..., None, :, :]


class _ScaledRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, A: Tensor, gains: Tensor) -> Tensor:
        ctx.save_for_backward(scale, A, gains)
        return plain(scale, A, gains)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale, A, gains = ctx.saved_tensors
        part = grad * A[:, None]
        return (
            torch.einsum("...rnm,...nm->...rn", part, gains),
            None,
            torch.einsum("...rnm,...rn->...nm", part, scale),
        )
