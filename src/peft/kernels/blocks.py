"""Products with block-diagonal matrices, without moving the features of a block together first.

Letters: N rows, n blocks of size b; t is (..., n b), blocks are (n, b, b).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .again import batched, differentiable
from .modes import PLAIN, is_autocast, node, once, reused, transformed

BROAD = 32  # from which size of a block on a product takes no longer per feature than of a smaller one


def plain(t: Tensor, blocks: Tensor) -> Tensor:
    """The definition: t diag(blocks) on the last axis, for blocks of any leading axes, (*lead, n, b, b)."""
    parts = t.unflatten(-1, blocks.shape[-3:-1])
    lead = blocks.dim() > 3
    return torch.einsum("...rnb,...nbc->...rnc" if lead else "...nb,nbc->...nc", parts, blocks).flatten(-2)


def times(t: Tensor, blocks: Tensor) -> Tensor:
    """`plain`, by products that read t and write the result where they stand, if these are ordinary tensors."""
    ordinary = type(t) in PLAIN and type(blocks) in PLAIN and blocks.dim() == 3 and t.dtype is blocks.dtype
    if not ordinary or t.is_nested or not t.numel() or transformed() or is_autocast(t):
        return plain(t, blocks)
    blocks = _widened(blocks)
    if torch.is_grad_enabled():
        return _times(t, blocks)
    return product(t, blocks)


def _widened(blocks: Tensor) -> Tensor:
    """The same matrix in larger blocks, if these are too small for a product of many to be quick."""
    n, b = blocks.shape[:2]
    several = next((k for k in range(BROAD // b, 1, -1) if n % k == 0), 1) if b < BROAD // 2 else 1
    if several == 1:
        return blocks
    groups = blocks.unflatten(0, (-1, several)).movedim(1, -1)  # (n / several, b, b, several)
    return torch.diag_embed(groups, dim1=1, dim2=3).flatten(3).flatten(1, 2)


def _rows(t: Tensor, blocks: Tensor) -> Tensor:
    """(N, n, b)."""
    return t.reshape(-1, *blocks.shape[:2])


def product(t: Tensor, blocks: Tensor) -> Tensor:
    """`plain` of ordinary tensors, for blocks (n, b, b), without a gradient."""
    if reused() or torch.compiler.is_compiling():  # the backward pass, by compiled autograd
        return plain(t, blocks)
    out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    torch.bmm(_rows(t, blocks).transpose(0, 1), blocks, out=_rows(out, blocks).transpose(0, 1))
    return out


def of_blocks(t: Tensor, grad: Tensor, blocks: Tensor) -> Tensor:
    """The blocks' gradient, from that of their product with t."""
    return torch.bmm(_rows(t, blocks).permute(1, 2, 0), _rows(grad, blocks).transpose(0, 1))


class _Times(torch.autograd.Function):
    """Saves t and the blocks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(t, blocks)
        return product(t, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        t, blocks = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or batched(grad):
            return differentiable(plain, (t, blocks), needs, grad)
        return product(grad, blocks.mT) if needs[0] else None, of_blocks(t, grad, blocks) if needs[1] else None


_times = node(_Times)


def one(like: Tensor) -> Tensor:
    """The identity of the last two axes' size, (b, b), which nobody may write into."""
    if transformed():
        return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return _eye(like.shape[-1], like.dtype, like.device)


@once
def _eye(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.eye(n, dtype=dtype, device=device)
