"""DoRA beside an output that its base layer gave, in training on a CPU: m / n (y - b + scale B A dropout(x)) + b.

Letters as in `scaled`, which has the definition. The gain is folded into B, so that thin products meet y's gradient as
it comes, in half precision or not, and what is as large as y is cast for a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import masks, narrow, returned, thin
from .again import batched, differentiable
from .modes import NARROW, is_autocast, node, shaped, without_autocast

Again = Callable[[Tensor], Tensor] | None


def serves(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any) -> bool:
    """Whether these are torch's own tensors on a CPU, and y has the dtype that was asked for."""
    if type(y) is not Tensor or y.is_nested or x.is_nested or A.dim() > 2 or not thin.takes(x, A, B, scale):
        return False
    if is_autocast(x):
        return y.dtype is torch.get_autocast_dtype(x.device.type)
    return y.dtype is A.dtype or y.dtype in NARROW


def add(y: Tensor, x: Tensor, *rest: Any, again: Again) -> Tensor:
    """The sum, in y's dtype, of (A, B, scale, p, m, n, b) besides; again(x), if any, is y once more."""
    if not is_autocast(x):
        return _add(y, x, *rest, again)
    again = None if again is None else _under(again, x.device.type, y.dtype)
    with without_autocast(x):  # sums in the factors' own dtype
        return _add(y, x.to(y.dtype), *rest, again)


def _under(again: Callable[[Tensor], Tensor], device: str, kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The same function under autocast, wherever it is called."""

    def run(x: Tensor) -> Tensor:
        with torch.autocast(device, kind):
            return again(x)

    return run


class _Add(torch.autograd.Function):
    """Saves x, bits of the mask, h = A dropout(x), and the output or y. The norm's owner keeps it alive."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, *rest: Any) -> Tensor:
        m, n, b, again = rest
        ctx.scale, ctx.norm, ctx.p, ctx.again = scale * masks.share(p), n, p, again
        gain = m / n
        h, bits = thin.down(x.reshape(-1, x.shape[-1]), A, p)
        out = narrow.times(y.reshape(-1, y.shape[-1]), h, B * gain[:, None], ctx.scale, gain, b)
        out = shaped(out, y.shape[:-1])
        saved, ctx.count = (y, None) if again is None else returned.keep(out, gain, y)
        ctx.save_for_backward(saved, x, A, B, m, b, gain, h, bits)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, x, A, B, m, b, gain, h, bits = ctx.saved_tensors
        needs, s, n, own = ctx.needs_input_grad, ctx.scale, ctx.norm, ctx.count is not None
        anew = torch.is_grad_enabled() or batched(grad)
        if own and (anew or not returned.holds(ctx.count)):
            own = False
            with without_autocast(x), torch.set_grad_enabled(anew):
                y = ctx.again(x)
        if anew:
            mask = masks.unpacked(bits, x.shape, A.dtype)

            def plainly(y: Tensor, x: Tensor, A: Tensor, B: Tensor, m: Tensor, b: Tensor | None) -> Tensor:
                kept = x.to(A.dtype) if mask is None else x.to(A.dtype) * mask
                z = (y if b is None else y - b) + kept @ A.mT @ B.mT * s
                return (z * (m / n) if b is None else z * (m / n) + b).to(y.dtype)

            wanted = (*needs[:4], needs[6], needs[8])
            of_y, of_x, of_A, of_B, of_m, of_b = differentiable(plainly, (y, x, A, B, m, b), wanted, grad)
            return of_y, of_x, of_A, of_B, None, None, of_m, None, of_b, None
        g = grad.reshape(-1, grad.shape[-1])
        back, of_gained = thin.of_h(g, B * gain[:, None], h if needs[3] or needs[6] else None, s)
        kind = x.dtype if needs[1] else None
        of_x, of_A = thin.of_x(back, x.reshape(-1, x.shape[-1]) if needs[2] else None, bits, A, kind)
        of_y, of_gain, sums = _through(g, y.reshape(g.shape), gain, needs[0], needs[6], b is not None)
        of_m = of_b = None
        if of_gain is not None:  # of what stands before the gain, or after it
            of_gain = of_gain if b is None else of_gain - b * sums
            of_m = of_gain / m if own else of_gain.add_((B * of_gained).sum(1)).div_(n)
        if needs[8]:
            of_b = (sums * (1 - gain)).to(grad.dtype)
        of_B = of_gained.mul_(gain[:, None]) if needs[3] and of_gained is not None else None
        of_x = None if of_x is None else of_x.view(x.shape)
        return None if of_y is None else of_y.view(grad.shape), of_x, of_A, of_B, None, None, of_m, None, of_b, None


def _through(
    g: Tensor, y: Tensor, gain: Tensor, passed: bool, products: bool, summed: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(g gain, sum of g y, sum of g), the sums over rows in the gain's dtype; those that are asked for."""
    of_y = torch.empty_like(g) if passed else None
    of_gain = torch.zeros_like(gain) if products else None
    sums = torch.zeros_like(gain) if summed else None
    for rows in (slice(None),) if g.numel() <= thin.ONE else thin.blocks(*g.shape):
        part = g[rows].to(gain.dtype)
        if of_gain is not None:
            of_gain.add_((part * y[rows]).sum(0))
        if sums is not None:
            sums.add_(part.sum(0))
        if of_y is not None:
            torch.mul(part, gain, out=of_y[rows])
    return of_y, of_gain, sums


_add = node(_Add)
