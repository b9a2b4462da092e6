"""Products of learnt tensors, and what stands for them at less cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .again import batched
from .modes import changed, node, transformed, without_autocast


def scaled_rows(scale: Tensor, A: Tensor, gains: Tensor) -> Tensor:
    """scale[r, n] A[r] gains[n]: (..., r, n, m) of A (r, m), which is frozen, scale (..., r, n), gains (..., n, m)."""
    if transformed() or not torch.is_grad_enabled():
        return plain(scale, A, gains)
    return _ScaledRows.apply(scale, A, gains)


def plain(scale: Tensor, A: Tensor, gains: Tensor) -> Tensor:
    """The definition."""
    return scale[..., None] * A[:, None] * gains[..., None, :, :]


def hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """(a1 b1) * (a2 b2), element by element; a (..., k, r), b (..., r, d)."""
    if transformed() or not torch.is_grad_enabled():
        return (a1 @ b1) * (a2 @ b2)
    with without_autocast(a1):
        return _hadamard(a1, b1, a2, b2)


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum over u, v of t[u, v] a[u, p] b[v, q]: (p, q, kernel)."""
    return torch.einsum("uvk,up,vq->pqk", t.flatten(2), a, b)


def pays(rank: int, out: int, inp: int) -> bool:
    """Whether two thin products of a rank take fewer operations than one with the whole matrix."""
    return rank * (out + inp) < out * inp


def khatri_rao(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """(A (r r, d), B (k, r r)) with B A = (a1 b1) * (a2 b2), element by element; a (k, r), b (r, d)."""
    return (b1[:, None] * b2).flatten(0, 1), (a1[:, :, None] * a2[:, None]).flatten(1)


class _Hadamard(torch.autograd.Function):
    """Saves the factors, and makes the halves again."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return changed(a1 @ b1, "mul", a2 @ b2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a1, b1, a2, b2 = ctx.saved_tensors
        one, other = grad * (a2 @ b2), grad * (a1 @ b1)
        return one @ b1.mT, a1.mT @ one, other @ b2.mT, a2.mT @ other


class _ScaledRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, A: Tensor, gains: Tensor) -> Tensor:
        ctx.save_for_backward(scale, A, gains)
        return plain(scale, A, gains)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale, A, gains = ctx.saved_tensors
        part = grad * A[:, None]
        if batched(grad):
            return (part * gains[..., None, :, :]).sum(-1), None, (part * scale[..., None]).sum(-3)
        return (
            torch.einsum("...rnm,...nm->...rn", part, gains),
            None,
            torch.einsum("...rnm,...rn->...nm", part, scale),
        )


_hadamard = node(_Hadamard)
