"""The thin products of a low-rank update on a CPU, in blocks of rows that stay in its cache.

Letters as in `lowrank`: x (N, d), h = A dropout(x) (N, r), y and g (N, k). What stands between two products, casts and
dropped inputs and masks as numbers, is made for a block at a time, so that it is neither written to memory nor read
from there, and no tensor of two dtypes is ever summed or multiplied, which costs torch a copy. `lowrank` has the plain
form beside it, which runs everywhere else, and where the gradients are differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import masks, whole
from .again import differentiable
from .modes import node

BLOCK = 2**17  # elements: half a megabyte in float32
ONE = 2**18  # elements of an input that is not worth dividing
WIDE = (torch.float32, torch.float64)
NARROW = (torch.float16, torch.bfloat16)
PLAIN = (Tensor, nn.Parameter)


def ordinary(x: Tensor, A: Tensor, B: Tensor, scale: Any) -> bool:
    """Whether these are torch's own tensors on a CPU, the factors in single precision or more."""
    if type(scale) is not float or not x.is_cpu or type(x) not in PLAIN or type(A) not in PLAIN or type(B) not in PLAIN:
        return False
    return A.dtype in WIDE and B.dtype is A.dtype and A.is_cpu and B.is_cpu


def takes(x: Tensor, A: Tensor, B: Tensor, scale: Any) -> bool:
    """Whether an input may be taken in blocks: `ordinary`, not empty, and x of the factors' dtype or large."""
    if not ordinary(x, A, B, scale) or not x.numel() or not B.numel():
        return False
    return x.dtype is A.dtype or (x.dtype in NARROW and x.numel() > BLOCK)  # of one block a cast is as quick at once


def _blocks(count: int, width: int) -> Iterator[slice]:
    """Rows in blocks, each a multiple of 8 rows, so that the mask of each begins with a byte."""
    step = max(8, BLOCK // width // 8 * 8)
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def down(x: Tensor, A: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """(h, the packed mask), h not yet divided by the share that is kept."""
    if not p and x.dtype is A.dtype:
        return F.linear(x, A), None
    h, bits = A.new_empty((x.shape[0], A.shape[0])), []
    for rows in _blocks(*x.shape):
        part = x[rows]
        if p:
            mask = masks.draw(part.shape, p, x.device)
            bits.append(masks.packed(mask))
            part = mask.to(A.dtype).mul_(part.to(A.dtype))
        torch.mm(part.to(A.dtype), A.t(), out=h[rows])
    if not p:
        return h, None
    return h, bits[0] if len(bits) == 1 else torch.cat(bits)  # type: ignore[arg-type]


def onto(y: Tensor, h: Tensor, B: Tensor, scale: float, own: bool) -> Tensor:
    """y + scale B h, rounded once; in y's memory, if that is the caller's own."""
    if y.dtype is h.dtype:
        return y.addmm_(h, B.t(), alpha=scale) if own else torch.addmm(y, h, B.t(), alpha=scale)
    out = y if own else torch.empty_like(y)
    for rows in _blocks(*y.shape):
        out[rows].copy_(y[rows].to(h.dtype).addmm_(h[rows], B.t(), alpha=scale))
    return out


def of_h(g: Tensor, B: Tensor, h: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """The gradients of h and, if that is there, of B, for an incoming g."""
    back = B.new_empty((g.shape[0], B.shape[1]))
    of_B = None if h is None else B.new_empty(B.shape)
    for rows in _blocks(*g.shape) if g.dtype is not B.dtype else (slice(0, g.shape[0]),):
        part = g[rows].to(B.dtype)
        back[rows].addmm_(part, B, beta=0, alpha=scale)
        if of_B is not None and h is not None:
            of_B.addmm_(part.t(), h[rows], beta=int(rows.start > 0), alpha=scale)
    return back, of_B


def of_x(
    back: Tensor, x: Tensor | None, bits: Tensor | None, A: Tensor, kind: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, in the dtype `kind`, and of A, from that of h; None without `kind`, and without x."""
    if bits is None and (x is None or x.dtype is A.dtype) and (kind is None or kind is A.dtype):
        return None if kind is None else torch.mm(back, A), None if x is None else torch.mm(back.t(), x)
    count, width = back.shape[0], A.shape[1]
    of_A = None if x is None else A.new_empty(A.shape)
    found = None if kind is None else A.new_empty((count, width), dtype=kind)
    for rows in _blocks(count, width):
        mask = None
        if bits is not None:
            held = bits[rows.start * width // 8 : -(-rows.stop * width // 8)]
            mask = masks.unpacked(held, (rows.stop - rows.start, width), A.dtype)
        if found is not None:
            part = torch.mm(back[rows], A)
            found[rows].copy_(part if mask is None else part.mul_(mask))
        if of_A is not None and x is not None:
            part = x[rows].to(A.dtype)
            of_A.addmm_(back[rows].t(), part if mask is None else mask.mul_(part), beta=int(rows.start > 0))
    return found, of_A


class Linear(torch.autograd.Function):
    """W x + b + scale B A dropout(x) of one dtype with a frozen W; saves x, the mask and h = A dropout(x).

    With dropout x is of up to `ONE` elements. The products are as few and as much alike as can be: after a large one
    the code of every other operation has left the cache, and fetching it takes longer than a thin product. The gradient
    of x is summed within the products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float) -> Any:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        (k, d), rows, reach = W.shape, flat.shape[0], math.inf if p else whole.reach(W, A)
        summed = rows * (k + d) >= reach  # as in evaluation, of which the output has the bits: some losses compare them
        ctx.summed, ctx.scale = rows * d >= reach, scale / (1.0 - p)
        y = F.linear(flat, whole.weight(W, A, B, scale) if summed else W, b)
        bits = None
        if p:
            mask = masks.draw(flat.shape, p, flat.device)
            h, bits = F.linear(mask.to(A.dtype).mul_(flat), A), masks.packed(mask)
        else:
            h = F.linear(flat, A)
        ctx.save_for_backward(x, W, b, A, B, h, bits)
        y = y if summed else y.addmm_(h, B.t(), alpha=ctx.scale)
        return y if flat is x else y.view(*x.shape[:-1], k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, b, A, B, h, bits = ctx.saved_tensors
        needs, scale = ctx.needs_input_grad, ctx.scale
        flat = x.reshape(-1, x.shape[-1])
        mask = masks.unpacked(bits, flat.shape, A.dtype)
        if torch.is_grad_enabled():

            def plain(x: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
                kept = x if mask is None else x * mask.view(x.shape)
                return F.linear(x, W, b) + F.linear(F.linear(kept, A), B) * scale

            of_x, *rest = differentiable(plain, (x, b, A, B), (needs[0], *needs[2:5]), grad)
            return of_x, None, *rest, None, None
        g = grad.reshape(-1, grad.shape[-1])
        back = torch.addmm(h, g, B, beta=0, alpha=scale)
        of_B = torch.addmm(B, g.t(), h, beta=0, alpha=scale) if needs[4] else None
        if needs[0]:
            of_x = None if ctx.summed else torch.mm(back, A) if mask is None else torch.mm(back, A).mul_(mask)
            of_x = g @ whole.weight(W, A, B, scale) if of_x is None else of_x.addmm_(g, W)
            of_x = of_x.view(x.shape)
        of_A = torch.mm(back.t(), flat if mask is None else mask.mul_(flat)) if needs[3] else None
        return of_x if needs[0] else None, None, g.sum(0) if needs[2] else None, of_A, of_B, None, None


linear = node(Linear)
