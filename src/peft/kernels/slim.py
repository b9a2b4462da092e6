"""Products on a CPU of which one matrix has few columns, the way round in which BLAS is quick at them.

MKL works through a result in tiles of 16 columns of single precision. A result (N, r) of few columns that fill no tile
costs it up to three times what its transpose (r, N) does, and one (k, r) that is summed over many rows up to thirty
times: at r=8, where most adapters are. Turning it round changes last bits, and which of the two is taken depends on
shapes alone. Letters: N rows, d or k features, r few.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .again import batched, differentiable
from .modes import PLAIN, changed, eager, node, reused, shaped

TILE = 16  # columns
ROWS, NUMBERS = 32, 2**13  # fewer are quick either way
FEW = 16  # the same of rows in one of several products at once
LARGE = 2**16  # numbers of g from which on turning a gradient pays for more than `COLUMNS` columns, or as a node
COLUMNS = 12


def down(x: Tensor, A: Tensor, scale: float = 1.0) -> Tensor:
    """scale x A', (N, r), for x (N, d) and A (r, d), of one dtype; its memory may lie column by column."""
    r = A.shape[0]
    turned = x.numel() >= NUMBERS and r % TILE and x.shape[0] >= ROWS and x.dtype is torch.float32 and x.is_cpu
    turned = turned and (r > 4 or A.stride(1) > 1)  # several threads are slow at turning fewer rows of a lying A
    if turned:
        A = A if r > 3 else A.contiguous()
        if scale == 1.0:
            return torch.mm(A, x.t()).t()
        return torch.addmm(A[:, :1], A, x.t(), beta=0, alpha=scale).t()
    return F.linear(x, A) if scale == 1.0 else torch.addmm(x[:, :1], x, A.t(), beta=0, alpha=scale)


def linear(x: Tensor, A: Tensor) -> Tensor:
    """A x, (..., r), for x (..., d) and A (r, d), where A may be a base weight, too."""
    if A.shape[0] % TILE and A.shape[0] < 4 * TILE and x.dim() > 1 and A.dtype is x.dtype is torch.float32 and eager():
        return down(x.reshape(-1, x.shape[-1]), A).unflatten(0, x.shape[:-1])
    return F.linear(x, A)


def outer(g: Tensor, h: Tensor, scale: float = 1.0) -> Tensor:
    """scale g' h, (k, r), for g (N, k) and h (N, r), of one dtype; row by row, as a gradient is that nobody copies."""
    (rows, k), r = g.shape, h.shape[1]
    if g.dtype is torch.float32 and g.is_cpu and _turns(rows, k, r):
        return torch.addmm(g[:1], h.t(), g, beta=0, alpha=scale).t().contiguous()
    return torch.addmm(g[:1, :1], g.t(), h, beta=0, alpha=scale) if rows else torch.mm(g.t(), h)


def backs(g: Tensor, B: Tensor) -> Tensor:
    """g B of each of S, (S, c, r), for g (S, c, k) and B (S, k, r); its memory may lie column by column."""
    if B.shape[2] % TILE and g.shape[1] >= FEW and g.numel() >= NUMBERS and g.dtype is torch.float32 and g.is_cpu:
        return torch.bmm(B.mT, g.mT).mT
    return torch.bmm(g, B)


def outers(g: Tensor, h: Tensor) -> Tensor:
    """g' h of each of S, (S, k, r), for g (S, c, k) and h (S, c, r); row by row."""
    (_, c, k), r = g.shape, h.shape[2]
    few = r < COLUMNS and c >= FEW and g.numel() >= NUMBERS
    if g.dtype is torch.float32 and g.is_cpu and (few or _turns(c, k, r)):
        return torch.bmm(h.mT, g).mT.contiguous()
    return torch.bmm(g.mT, h)


def _turns(rows: int, k: int, r: int) -> bool:
    """Whether a gradient (k, r) is summed in its transpose."""
    if r < COLUMNS:
        return r > 1 and rows >= ROWS and rows * k >= NUMBERS
    return rows >= 128 and k >= max(8 * r, 256) and rows * k >= LARGE and torch.get_num_threads() == 1


def onto(y: Tensor, h: Tensor, B: Tensor, scale: float, own: bool = True) -> Tensor:
    """y + scale h B', (N, k), for h (N, r) and B (k, r), of one dtype; in the memory of y, if that is the caller's."""
    if _pays(h, B):
        return _onto(y, h, B, scale, own and not reused())
    return changed(y, "addmm", h, B.mT, alpha=scale) if own else torch.addmm(y, h, B.mT, alpha=scale)


def up(h: Tensor, B: Tensor, b: Tensor | None = None) -> Tensor:
    """B h + b, (..., k), for h (..., r) and B (k, r)."""
    return _up(h, B, b) if _pays(h, B) else F.linear(h, B, b)


def _pays(h: Tensor, B: Tensor) -> bool:
    """Whether B's gradient is wanted, and quicker to sum in its transpose by more than a node takes."""
    if not (B.requires_grad and torch.is_grad_enabled() and B.dtype is torch.float32 is h.dtype and B.is_cpu):
        return False
    if B.dim() != 2 or not B.is_contiguous() or type(B) not in PLAIN or type(h) not in PLAIN or not eager():
        return False
    (k, r), rows = B.shape, h.numel() // max(1, h.shape[-1])
    return rows * k >= (LARGE if r < COLUMNS else 2 * LARGE) and _turns(rows, k, r)


class _Onto(torch.autograd.Function):
    """y + scale h B'; saves h and B."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, scale: float, own: bool) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(h, B)
        if not own:
            return torch.addmm(y, h, B.mT, alpha=scale)
        ctx.mark_dirty(y)
        return y.addmm_(h, B.mT, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, B = ctx.saved_tensors
        of_y = grad if ctx.needs_input_grad[0] else None
        return of_y, *_grads(grad, h, B, ctx.scale, ctx.needs_input_grad[1:3]), None, None


class _Up(torch.autograd.Function):
    """B h + b; saves h and B."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, B: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, B)
        return shaped(F.linear(h.reshape(-1, h.shape[-1]), B, b), h.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, B = ctx.saved_tensors
        of_b = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return *_grads(grad, h, B, 1.0, ctx.needs_input_grad[:2]), of_b


def _grads(grad: Tensor, h: Tensor, B: Tensor, s: float, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of s h B' with respect to h and B."""
    if torch.is_grad_enabled() or batched(grad):
        return differentiable(lambda h, B: F.linear(h, B) * s, (h, B), needs, grad)
    g, flat = grad.reshape(-1, grad.shape[-1]), h.reshape(-1, h.shape[-1])
    of_h = down(g, B.mT, s).reshape(h.shape) if needs[0] else None
    return of_h, outer(g, flat, s) if needs[1] else None


_onto, _up = node(_Onto), node(_Up)
