"""The thin products of a low-rank update on a CPU, in blocks of rows that stay in its cache.

Letters as in `lowrank`: x (N, d), h = A dropout(x) (N, r), y and g (N, k). What stands between two products, casts and
dropped inputs and masks as numbers, is made for a block at a time, so that it is neither written to memory nor read
from there, and no tensor of two dtypes is ever summed or multiplied, which costs torch a copy. `lowrank` has the plain
form beside it, which runs everywhere else, and where the gradients are differentiated again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import _C, Tensor

from . import halves, masks, slim, whole
from .again import batched, differentiable
from .modes import NARROW, PLAIN, WIDE, changed, node, reused, shaped

BLOCK = 2**17  # elements: half a megabyte in float32
_coarsest = threading.local()
ONE = 2**18  # elements of an input that is not worth dividing


@contextmanager
def coarse(elements: int) -> Iterator[None]:
    """Blocks of so many elements at least, in this thread alone; for whoever looks at every operation."""
    usual, _coarsest.elements = getattr(_coarsest, "elements", 0), elements
    try:
        yield
    finally:
        _coarsest.elements = usual


def ordinary(x: Tensor, A: Tensor, B: Tensor, scale: Any) -> bool:
    """Whether these are torch's own tensors on a CPU, the factors in single precision or more."""
    if type(scale) is not float or not x.is_cpu or type(x) not in PLAIN or type(A) not in PLAIN or type(B) not in PLAIN:
        return False
    return A.dtype in WIDE and B.dtype is A.dtype and A.is_cpu and B.is_cpu


def takes(x: Tensor, A: Tensor, B: Tensor, scale: Any) -> bool:
    """Whether an input may be taken in blocks: `ordinary`, not empty, x of the factors' dtype or less."""
    return ordinary(x, A, B, scale) and x.numel() > 0 and B.numel() > 0 and (x.dtype is A.dtype or x.dtype in NARROW)


def blocks(count: int, width: int) -> Iterator[slice]:
    """Rows in blocks, each a multiple of 8 rows, so that the mask of each begins with a byte."""
    step = max(8, max(BLOCK, getattr(_coarsest, "elements", 0)) // width // 8 * 8)
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def down(x: Tensor, A: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """(h, the packed mask), h not yet divided by the share that is kept."""
    size = x.numel()
    if size <= ONE or not (p or x.dtype is not A.dtype):
        if not p:
            x = x if x.dtype is A.dtype else x.to(A.dtype)
            return (slim.down(x, A) if size >= slim.NUMBERS and A.shape[0] % slim.TILE else F.linear(x, A)), None
        mask = masks.draw(x.shape, p, x.device)
        return slim.down(_kept(mask.to(A.dtype), x), A), masks.packed(mask)
    if not p and halves.suit(size, x.dtype, A, halves.MORE):
        return halves.wide(x, A.t()), None
    h, bits = A.new_empty((x.shape[0], A.shape[0])), []
    for rows in blocks(*x.shape):
        part = x[rows]
        if p:
            mask = masks.draw(part.shape, p, x.device)
            bits.append(masks.bits(mask))
            part = _kept(mask.to(A.dtype), part)
        h[rows].copy_(slim.down(part.to(A.dtype), A))
    return h, torch.cat(bits) if p else None


def _kept(mask: Tensor, x: Tensor) -> Tensor:
    """What a mask, in the dtype of numbers to come, leaves of x; in its own memory."""
    return changed(mask, "mul", x if x.dtype is mask.dtype else x.to(mask.dtype))


def onto(y: Tensor, h: Tensor, B: Tensor, scale: float, own: bool) -> Tensor:
    """y + scale B h, rounded once; in y's memory, if that is the caller's own."""
    own = own and not (_C._len_torch_dispatch_stack() and reused())
    if y.dtype is h.dtype:
        return y.addmm_(h, B.mT, alpha=scale) if own else torch.addmm(y, h, B.mT, alpha=scale)
    if y.numel() <= ONE:
        return changed(y.to(h.dtype), "addmm", h, B.t(), alpha=scale).to(y.dtype)
    if halves.suit(y.numel(), y.dtype, h):
        return halves.onto(y if own else y.clone(), h if scale == 1 else h * scale, B.t())
    out = y if own else torch.empty_like(y)
    for rows in blocks(*y.shape):
        out[rows].copy_(changed(y[rows].to(h.dtype), "addmm", h[rows], B.t(), alpha=scale))
    return out


def of_h(g: Tensor, B: Tensor, h: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """The gradients of h and, if that is there, of B, for an incoming g."""
    if g.dtype is B.dtype or g.numel() <= ONE:
        g = g if g.dtype is B.dtype else g.to(B.dtype)
        if g.numel() >= (slim.NUMBERS if B.shape[1] % slim.TILE else slim.LARGE):
            return slim.down(g, B.t(), scale), None if h is None else slim.outer(g, h, scale)
        back = torch.addmm(B[:1] if h is None else h, g, B, beta=0, alpha=scale)
        return back, None if h is None else torch.addmm(B, g.t(), h, beta=0, alpha=scale)
    if halves.suit(g.numel(), g.dtype, B, halves.MORE):
        return halves.wide(g, B).mul_(scale), None if h is None else halves.across(h, g).t().contiguous().mul_(scale)
    back = B.new_empty((g.shape[0], B.shape[1]))
    of_B = None if h is None else B.new_empty((B.shape[1], B.shape[0]))
    for rows in blocks(*g.shape):
        part = g[rows].to(B.dtype)
        back[rows].copy_(slim.down(part, B.t(), scale))
        if of_B is not None and h is not None:
            of_B.addmm_(h[rows].t(), part, beta=int(rows.start > 0), alpha=scale)
    return back, None if of_B is None else of_B.t().contiguous()


def of_x(
    back: Tensor, x: Tensor | None, bits: Tensor | None, A: Tensor, kind: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, in the dtype `kind`, and of A, from that of h; None without `kind`, and without x."""
    count, width = back.shape[0], A.shape[1]
    simple = bits is None and (x is None or x.dtype is A.dtype) and (kind is None or kind is A.dtype)
    if simple or count * width <= ONE:
        mask = masks.unpacked(bits, (count, width), A.dtype)
        found = None if kind is None else torch.mm(back, A)
        found = found if found is None or mask is None else found.mul_(mask)
        found = found if found is None or kind is A.dtype else found.to(kind)
        if x is not None:
            x = _kept(mask, x) if mask is not None else x if x.dtype is A.dtype else x.to(A.dtype)
        return found, None if x is None else torch.mm(back.t(), x)
    if bits is None and x is not None and halves.suit(x.numel(), x.dtype, A, halves.MORE):
        return of_x(back, None, None, A, kind)[0], halves.across(back, x)
    if bits is None and kind is not None and halves.suit(count * width, kind, A):
        return halves.product(back, A), of_x(back, x, None, A, None)[1]
    of_A = None if x is None else A.new_empty(A.shape)
    found = None if kind is None else A.new_empty((count, width), dtype=kind)
    for rows in blocks(count, width):
        held = None if bits is None else bits[rows.start * width // 8 : -(-rows.stop * width // 8)]
        mask = None if held is None else masks.of_bits(held, (rows.stop - rows.start, width), A.dtype)
        if found is not None:
            part = torch.mm(back[rows], A)
            found[rows].copy_(part if mask is None else part.mul_(mask))
        if of_A is not None and x is not None:
            part = x[rows].to(A.dtype) if mask is None else _kept(mask, x[rows])
            of_A.addmm_(back[rows].t(), part, beta=int(rows.start > 0))
    return found, of_A


class Linear(torch.autograd.Function):
    """W x + b + scale B A dropout(x) with a frozen W of x's dtype; saves x, the mask and h = A dropout(x).

    The products are as few and as much alike as can be: after a large one the code of every other operation has left
    the cache, and fetching it takes longer than a thin product. The gradient of x is summed within the products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float) -> Any:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        (k, d), rows, reach = W.shape, flat.shape[0], math.inf if p else whole.reach(W, A)
        summed = rows * (k + d) >= reach  # as in evaluation, of which the output has the bits: some losses compare them
        ctx.summed, ctx.scale = rows * d >= reach, scale * masks.share(p) if p else scale
        y = F.linear(flat, whole.weight(W, A, B, scale) if summed else W, b)
        h, bits = down(flat, A, p)
        ctx.save_for_backward(x, W, b, A, B, h if ctx.needs_input_grad[4] else None, bits)
        y = y if summed else onto(y, h, B, ctx.scale, True)
        return y if flat is x else shaped(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, b, A, B, h, bits = ctx.saved_tensors
        needs, scale, flat = ctx.needs_input_grad, ctx.scale, x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() or batched(grad):
            mask = masks.unpacked(bits, x.shape, A.dtype)

            def plain(x: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
                kept = x.to(A.dtype) if mask is None else x.to(A.dtype) * mask
                return (F.linear(x, W, b) + F.linear(F.linear(kept, A), B) * scale).to(x.dtype)

            found, *rest = differentiable(plain, (x, b, A, B), (needs[0], *needs[2:5]), grad)
            return found, None, *rest, None, None
        g = grad.reshape(-1, grad.shape[-1])
        back, of_B = of_h(g, B, h, scale)
        wanted = x.dtype if needs[0] and not ctx.summed else None
        found, of_A = of_x(back, flat if needs[3] else None, bits, A, wanted)
        if needs[0]:
            found = g @ whole.weight(W, A, B, scale) if found is None else found.addmm_(g, W)
            found = found.view(x.shape)
        return found, None, g.sum(0) if needs[2] else None, of_A, of_B, None, None


linear = node(Linear)
