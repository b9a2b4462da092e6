"""y + scale B A dropout(x) by the kernels of `thin`: forward and gradients, for one adapter or for the slots of a bank.

Letters as in `thin`; B is (R, k) but where it is said to be (k, r). For the backward pass x, h and the seed of the mask
(8 bytes) are kept. A and B must both learn where gradients are wanted: where one is frozen the torch forms keep less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..again import batched, differentiable
from . import launch
from .segments import Segments


class How(NamedTuple):
    """What an update is, apart from its tensors.

    Attributes:
        scale: of the update; the share that dropout keeps is divided out of it already.
        rank: the largest of all slots.
        rate, seed: of dropout; no seed, no dropout.
        at, starts: tokens by slot and the slots of the bank; None for one adapter.
    """

    scale: float
    rank: int
    rate: float = 0.0
    seed: Tensor | None = None
    at: Segments | None = None
    starts: Tensor | None = None

    @property
    def where(self) -> tuple[Segments | None, Tensor | None]:
        return self.at, self.starts

    @property
    def drop(self) -> tuple[Tensor | None, float]:
        return self.seed, self.rate


def one(x: Tensor, rank: int, scale: float, rate: float) -> How:
    """The update of one adapter; draws the mask."""
    return How(scale / (1.0 - rate) if rate < 1 else 0.0, rank, rate, launch.seed_of(x) if rate else None)


def linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, rate: float) -> Tensor:
    """W x + b + scale B A dropout(x), W frozen: (..., d) -> (..., k)."""
    flat = x.view(-1, x.shape[-1])
    y = _Linear.apply(flat, W, b, A, B.mT.contiguous(), one(x, A.shape[0], scale, rate))
    return y.view(*x.shape[:-1], y.shape[-1])


def add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, rate: float) -> Tensor:
    """y + scale B A dropout(x)."""
    how = one(x, A.shape[0], scale, rate)
    return _Add.apply(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), A, B.mT.contiguous(), how).view(y.shape)


def mixed(y: Tensor, x: Tensor, A: Tensor, B: Tensor, how: How) -> Tensor:
    """y and the update of each token by its slot of a bank: y (N, k), x (N, d), A (R, d), B (R, k)."""
    return _Add.apply(y, x, A, B, how)


def place(y: Tensor, x: Tensor, A: Tensor, B: Tensor, how: How) -> Tensor:
    """The same in y itself, without gradients."""
    return launch.expand(shrunk(x, A, how), B, y, how.scale, *how.where, by_rank=True)


def decode(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W x + b + scale B A x for a few tokens, without gradients."""
    flat = x.view(-1, x.shape[-1])
    return launch.few(flat, A, B, F.linear(flat, W, b), scale).view(*x.shape[:-1], W.shape[0])


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, how: How, mask: Tensor | None = None) -> Tensor:
    """The same in torch's operations, slot by slot: the definition, for a mask that was drawn."""
    x = (x if mask is None else x * mask).to(A.dtype)
    if how.at is None or how.starts is None:
        return (y + (x @ A.mT @ B) * how.scale).to(y.dtype)
    at, positions = how.at, how.at.positions
    starts = how.starts.tolist()
    tokens = (at.rows[:, None] * positions + torch.arange(positions, device=x.device)).flatten()
    for slot, first, last in at.spans.tolist():
        mine, part = tokens[first:last], slice(starts[slot], starts[slot + 1])
        update = (x.index_select(0, mine) @ A[part].mT @ B[part]) * how.scale
        y = y.index_copy(0, mine, (y.index_select(0, mine) + update).to(y.dtype))
    return y


def mask_of(x: Tensor, how: How) -> Tensor | None:
    """Dropout's mask as a tensor."""
    return None if how.seed is None else launch.mask(x, how.seed, how.rate)


def shrunk(x: Tensor, A: Tensor, how: How) -> Tensor:
    return launch.shrink(x, A, how.rank, *how.where, *how.drop)


def gradients(
    g: Tensor, x: Tensor, A: Tensor, B: Tensor, h: Tensor, how: How, needs: Sequence[bool], into: Callable[[], Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the update with respect to x, A and B.

    Arguments:
        g: (N, k), that of the output.
        x, A, B, how: as in the forward pass.
        h: (parts, N, rank), A dropout(x).
        needs: which are wanted.
        into: makes the tensor that the gradient of x is added to, (N, d).
    """
    of_x = of_A = of_B = None
    if needs[0] or needs[1]:
        back = launch.shrink(g, B, how.rank, *how.where)
        if needs[0]:
            of_x = launch.expand(back, A, into(), how.scale, *how.where, *how.drop, by_rank=True)
        if needs[1]:
            of_A = launch.outer(whole(back), x, len(A), A.dtype, how.scale, *how.where, *how.drop).to(A.dtype)
    if needs[2]:
        of_B = launch.outer(whole(h), g, len(B), B.dtype, how.scale, *how.where).to(B.dtype)
    return of_x, of_A, of_B


def whole(h: Tensor) -> Tensor:
    """(N, rank) of its parts."""
    return h[0] if len(h) == 1 else h.sum(0)


class _Add(torch.autograd.Function):
    """Saves x, h and the seed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, how: How) -> Tensor:
        h = shrunk(x, A, how)
        ctx.how = how._replace(seed=None)
        ctx.save_for_backward(y, x, A, B, whole(h), how.seed)
        return launch.expand(h, B, y.clone(), how.scale, *how.where, by_rank=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, x, A, B, h, seed = ctx.saved_tensors
        how, needs = ctx.how._replace(seed=seed), ctx.needs_input_grad
        if torch.is_grad_enabled() or batched(grad):
            mask = mask_of(x, how)
            return (*differentiable(partial(plain, how=how, mask=mask), (y, x, A, B), needs[:4], grad), None)
        found = gradients(grad.contiguous(), x, A, B, h[None], how, needs[1:4], lambda: torch.zeros_like(x))
        return (grad if needs[0] else None, *found, None)


class _Linear(torch.autograd.Function):
    """Saves x, h and the seed; the gradient of x is accumulated in that of the frozen product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, how: How) -> Tensor:
        h = shrunk(x, A, how)
        ctx.how = how._replace(seed=None)
        ctx.save_for_backward(x, W, b, A, B, whole(h), how.seed)
        return launch.expand(h, B, F.linear(x, W, b), how.scale, by_rank=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, W, b, A, B, h, seed = ctx.saved_tensors
        how, needs = ctx.how._replace(seed=seed), ctx.needs_input_grad
        thin = (needs[0], *needs[3:5])
        if torch.is_grad_enabled() or batched(grad):
            mask = mask_of(x, how)

            def plainly(x: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
                return plain(F.linear(x, W, b), x, A, B, how, mask)

            of_x, of_b, of_A, of_B = differentiable(plainly, (x, b, A, B), (needs[0], *needs[2:5]), grad)
            return of_x, None, of_b, of_A, of_B, None
        g = grad.contiguous()
        of_x, of_A, of_B = gradients(g, x, A, B, h[None], how, thin, lambda: g @ W)
        return of_x, None, g.sum(0) if needs[2] else None, of_A, of_B, None
