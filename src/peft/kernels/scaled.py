"""A low-rank update under a gain for each out-feature (DoRA), which keeps little for the backward pass.

Letters as in `lowrank`: N tokens, d in-features, k out-features, r rank; the gain is m / n, the magnitude m of (k,)
over the norm n, which is a constant of the gradient (Liu et al. 2024, arXiv 2402.09353, section 4.3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import beside, choice, halves, masks, narrow, returned, slim, thin, whole
from .again import batched, differentiable
from .beside import Again
from .modes import PLAIN, changed, node, reused, shaped, transformed

TILE_ELEMENTS = 16 * 2**20


def tiles(W: Tensor) -> tuple[Tensor, ...]:
    """W in blocks of rows, so that a cast to float32 never holds a second copy of a large weight."""
    per_row = max(1, W.numel() // W.shape[-2])
    return (W,) if W.numel() <= TILE_ELEMENTS else W.split(max(1, TILE_ELEMENTS // per_row), dim=-2)


def square(W: Tensor) -> Tensor:
    """|W_o|^2 of each row, in float32, or float64 of such a weight."""
    parts = [(w if w.dtype is torch.float64 else w.float()).square().sum(-1) for w in tiles(W)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def product(z: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """z g + b, of any dtypes; in one operation where no gradient is wanted, which takes one pass more of that."""
    once = b.dtype is z.dtype is g.dtype and not torch.is_grad_enabled()
    return torch.addcmul(b, z, g) if once else z * g + b


def by_rows(V: Tensor, g: Tensor) -> Tensor:
    """diag(g) V, (..., k, d), in V's place, which is nobody else's, where no gradient is wanted."""
    if torch.is_grad_enabled() or transformed() or V.dtype is not g.dtype:
        return V * g[..., None]
    return changed(V, "mul", g[..., None])


def norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, s: Any) -> Tensor:
    """|W + s B A| of each row, from W's `square`, without the product where that costs more; A and B are wide."""
    if _narrow(W, A):
        return torch.linalg.vector_norm(W.to(A.dtype) + (B @ A) * s, dim=-1)
    if choice.devices and (found := choice.norms(W, squares, A, B, s)) is not None:
        return found
    parts = [_down(w, A) for w in tiles(W)]
    cross = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
    if W.dim() == 2 and type(s) is float:
        inner = torch.addmm(cross, B, A @ A.mT, beta=2 * s, alpha=s * s)
        return (changed(inner, "mul", B).sum(-1) + squares).clamp_min(0).sqrt()
    return (squares + ((cross * (2 * s) + (B @ (A @ A.mT)) * (s * s)) * B).sum(-1)).clamp_min(0).sqrt()


def _down(W: Tensor, A: Tensor) -> Tensor:
    """W A' in A's dtype."""
    if W.dim() > 2:
        return W.to(A.dtype) @ A.mT
    return halves.wide(W, A.t()) if halves.suit(W.numel(), W.dtype, A, halves.SQUARE) else slim.down(W.to(A.dtype), A)


def _narrow(W: Tensor, A: Tensor) -> bool:
    """Whether W + s B A is as cheap as what avoids it, in which much cancels where the sum of few features is small."""
    return W.dim() == 2 and W.shape[1] <= A.shape[0]


def _onto(z: Tensor, h: Tensor, B: Tensor, s: Any) -> Tensor:
    """z + s B h, in the memory of z."""
    h, s = (h, s) if type(s) is float else (h * s, 1)
    return changed(z, "addmm", h, B.mT, alpha=s)


def _over(squares: Tensor) -> Tensor:
    """One over their roots; where a row is zero its direction does not matter: its length is 1."""
    return torch.threshold(squares, 0, 1).rsqrt()


def _joined(
    x: Tensor, kept: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, squares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(z = W x + s B h, h = A kept, 1 / |V|), all three from three products, in which the rows of A join those of x.

    Where x ends they give A W' + s/2 A A' B', and |V|^2 = |W|^2 + 2 s of its scalar products with B.
    """
    parts = (x.shape[0], A.shape[0])
    both = torch.cat((x, A))
    zs, hs = F.linear(both, W), slim.down(both if kept is x else torch.cat((kept, A)), A)
    (z, half), (h, gram) = zs.split_with_sizes(parts), hs.split_with_sizes(parts)
    gram *= 0.5
    zs.addmm_(hs, B.mT, alpha=s)
    return z, h, _over(torch.add(squares, half.mul_(B.mT).sum(0), alpha=2 * s))


def plain(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float, gain: Tensor, bias: Tensor | None
) -> Tensor:
    """gain (y - bias + scale B A dropout(x)) + bias, in the dtype of y. The definition; gain is (k,)."""
    x = x.to(A.dtype)
    return _gained(y, masks.dropout(x, p), A, B, scale, gain, bias)


def _gained(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, gain: Tensor, bias: Tensor | None) -> Tensor:
    z = y if bias is None else y - bias
    out = (z + F.linear(F.linear(x, A), B) * scale) * gain
    return (out if bias is None else out + bias).to(y.dtype)


def add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Any,
    p: float,
    m: Tensor,
    n: Tensor,
    b: Tensor | None,
    again: Again,
) -> Tensor:
    """m / n (y - b + scale B A dropout(x)) + b, in the form that keeps least; again(x), if any, is y once more."""
    if choice.devices and (found := choice.add_scaled(y, x, A, B, scale, p, m, n, b)) is not None:
        return found
    if not torch.is_grad_enabled() or transformed():
        return plain(y, x, A, B, scale, p, m / n, b)
    if beside.serves(y, x, A, B, scale):
        return beside.add(y, x, A, B, scale, p, m, n, b, again=again)
    if torch.is_autocast_enabled(x.device.type):
        return plain(y, x, A, B, scale, p, m / n, b)
    return _add(y, x, A, B, scale, p, m, n, b)


def linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Any, p: float, m: Tensor, n: Tensor
) -> Tensor:
    """m / n (W x + scale B A dropout(x)) + b with a frozen W, all of one dtype, on a layer that nothing else sees."""
    if choice.devices and (found := choice.linear_scaled(x, W, b, A, B, scale, p, m, n)) is not None:
        return found
    if transformed() or not torch.is_grad_enabled():
        return plain(F.linear(x, W, b), x, A, B, scale, p, m / n, b)
    return fused(x, W, b, A, B, scale, p, m, n, None)


def normed(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Any, p: float, m: Tensor, squares: Any
) -> Tensor | None:
    """`linear` with the norm taken on the way, from `square` of W, which squares() gives; None where not possible.

    W A' comes out of the product with x, which the rows of A join, where W is read anyway.
    """
    if not thin.ordinary(x, A, B, scale) or x.dtype is not torch.float32 or type(W) not in PLAIN or transformed():
        return None
    if _narrow(W, A):
        return None
    found = None if "cpu" in choice.devices else squares()
    return None if found is None else fused(x, W, b, A, B, scale, p, m, None, found)


def folded(A: Tensor, B: Tensor, scale: Any, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `evaluated` takes beside the layer: A, gain, and B with all factors in it."""
    return A, gain, B * gain[:, None] * scale


def evaluated(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, gain: Tensor, gained: Tensor) -> Tensor:
    """The same where no gradient is wanted, of what stays between forwards; x and W may be narrower than that."""
    traced = torch.compiler.is_compiling() or torch._C._is_tracing()  # for other numbers of rows, too
    if x.dtype is not A.dtype:
        return narrow.gained(x, W, b, A, gain, gained)
    # products of matrices are a long way round for a single row
    if x.numel() == x.shape[-1] and x.is_cpu and not traced:
        v = x.view(-1)
        u = W.mv(v)
        u = u.mul_(gain) if b is None else torch.addcmul(b, u, gain)
        return u.addmv_(gained, A.mv(v)).view(*x.shape[:-1], W.shape[0])
    flat = x.reshape(-1, x.shape[-1])
    if not traced and thin.ordinary(x, A, gained, 1.0) and whole.serves(flat.shape[0], sum(W.shape), W, A):
        return F.linear(x, (W * gain[:, None]).addmm_(gained, A), b)
    y = F.linear(flat, W)
    y = y.mul_(gain) if b is None else torch.addcmul(b, y, gain)
    return y.addmm_(F.linear(flat, A) if traced else slim.down(flat, A), gained.mT).view(*x.shape[:-1], W.shape[0])


def _mask(x: Tensor, p: float) -> Tensor | None:
    """Which elements dropout keeps, of 0 and 1, a byte an element."""
    return masks.draw(x.shape, p, x.device) if p else None


def _rows(t: Tensor) -> Tensor:
    """(N, ...), of which a single token is one."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def _dropped(x: Tensor, mask: Tensor | None, p: float, A: Tensor) -> Tensor:
    """dropout(x) of a mask that was drawn, in A's dtype."""
    x = x.to(A.dtype)  # a product of two dtypes costs torch a copy more
    return x if mask is None else changed(changed(mask.to(A.dtype), "mul", x), "mul", masks.share(p))


class _Add(torch.autograd.Function):
    """Saves y, x and the mask; what the update adds to y is computed again. The norm's owner keeps it alive."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float, *rest: Any) -> Tensor:
        m, n, b = rest
        mask = _mask(x, p)
        ctx.scale, ctx.norm, ctx.p = scale, n, p
        ctx.save_for_backward(y, x, A, B, m, b, mask)
        z = changed(F.linear(F.linear(_dropped(x, mask, p, A), A), B), "mul", scale)
        z = changed(z, "add", y) if b is None else changed(changed(z, "add", y), "sub", b)
        out = changed(z, "mul", m / n)
        return (out if b is None else changed(out, "add", b)).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, x, A, B, m, b, mask = ctx.saved_tensors
        needs, s, n, p = ctx.needs_input_grad, ctx.scale, ctx.norm, ctx.p
        if torch.is_grad_enabled() or batched(grad):

            def plainly(y: Tensor, x: Tensor, A: Tensor, B: Tensor, m: Tensor, b: Tensor | None) -> Tensor:
                return _gained(y, _dropped(x, mask, p, A), A, B, s, m / n, b)

            of_y, of_x, of_A, of_B, of_m, of_b = differentiable(
                plainly, (y, x, A, B, m, b), (*needs[:4], needs[6], needs[8]), grad
            )
            return of_y, of_x, of_A, of_B, None, None, of_m, None, of_b
        g, kept = grad.to(A.dtype), _dropped(x, mask, p, A)
        h = F.linear(kept, A)
        inner = (g * (m / n)).to(A.dtype)
        of_m = None
        if needs[6]:
            z = F.linear(h, B).mul_(s).add_(y)
            of_m = _rows(g * (z if b is None else z.sub_(b))).sum(0) / n
        of_x, of_A, of_B = _thin(_rows(inner), _rows(kept), mask, A, B, _rows(h), s, p, needs[1:4])
        of_b = (_rows(g).sum(0) - _rows(inner).sum(0)).to(grad.dtype) if needs[8] else None
        of_x = None if of_x is None else of_x.to(x.dtype).view(x.shape)
        return inner.to(grad.dtype) if needs[0] else None, of_x, of_A, of_B, None, None, of_m, None, of_b


class _Linear(torch.autograd.Function):
    """Saves x, the mask, h = A dropout(x), the output or z = W x + scale B h; x's gradient is summed in one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
        scale, p, m, n, squares = rest
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        (k, d), rows, reach = W.shape, flat.shape[0], math.inf
        if not p and (n is None or thin.ordinary(x, A, B, scale)):
            reach = whole.reach(W, A)
        mask = _mask(flat, p) if p else None
        kept = _dropped(flat, mask, p, A) if p else flat
        ctx.summed, ctx.scale, ctx.p = rows * d >= reach, scale, p
        over = None if n is None else n.reciprocal()
        if rows * (k + d) >= reach:
            V, h = whole.weight(W, A, B, scale), slim.down(kept, A)
            z, over = F.linear(flat, V), _over(V.square().sum(1)) if over is None else over
        elif over is None and not (torch._C._len_torch_dispatch_stack() and reused()):
            z, h, over = _joined(flat, kept, W, A, B, scale, squares)
        else:
            h = slim.down(kept, A)
            z = _onto(F.linear(flat, W), h, B, scale)
            over = _over(norms(W, squares, A, B, scale).square()) if over is None else over
        gain = m * over
        out = z * gain if b is None else torch.addcmul(b, z, gain)
        out = out if flat is x else shaped(out, x.shape[:-1])
        saved, ctx.count = returned.keep(out, gain, z)
        ctx.save_for_backward(x, W, b, A, B, m, over, gain, masks.packed(mask) if p else None, h, saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, b, A, B, m, over, gain, bits, h, z = ctx.saved_tensors
        needs, s, p = ctx.needs_input_grad, ctx.scale, ctx.p
        mask = masks.unpacked(bits, x.shape) if p else None
        if torch.is_grad_enabled() or batched(grad):

            def plainly(x: Tensor, b: Tensor | None, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
                return _gained(F.linear(x, W, b), _dropped(x, mask, p, A), A, B, s, m * over, b)

            wanted = (needs[0], *needs[2:5], needs[7])
            of_x, of_b, of_A, of_B, of_m = differentiable(plainly, (x, b, A, B, m), wanted, grad)
            return of_x, None, of_b, of_A, of_B, None, None, of_m, None, None
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        kept = _rows(_dropped(x, mask, p, A)) if p else flat
        of_b = g.sum(0) if needs[2] else None
        of_m = None
        if needs[7]:  # first, so that the next product gets the memory of this
            if own := returned.holds(ctx.count):
                z = z.view(g.shape)
            elif ctx.count is not None:
                z = _onto(F.linear(flat, W), h, B, s)
            of_m = (g * z).sum(0)
            of_m = of_m.mul_(over) if not own else (of_m if b is None else of_m - b * g.sum(0)).div_(m)
        inner = g * gain
        of_x, of_A, of_B = _thin(inner, kept, mask, A, B, h, s, p, (needs[0] and not ctx.summed, *needs[3:5]))
        if needs[0]:
            of_x = inner @ whole.weight(W, A, B, s) if of_x is None else of_x.addmm_(inner, W)
            of_x = of_x.view(x.shape)
        return of_x, None, of_b, of_A, of_B, None, None, of_m, None, None


_add, fused = node(_Add), node(_Linear)


def _thin(
    g: Tensor, kept: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, h: Tensor, s: Any, p: float, needs: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of s B A kept with respect to x, A and B for an incoming g; `kept` is x where the mask is, scaled.

    All are of rows.
    """
    of_x = None
    if type(s) is float:
        back, of_B = thin.of_h(g, B, h if needs[2] else None, s)
    else:
        back, of_B = slim.down(g, B.mT) * s, slim.outer(g, h * s) if needs[2] else None
    of_A = back.mT @ kept if needs[1] else None
    if needs[0]:
        of_x = back @ A
        of_x = of_x if mask is None else of_x.mul_(mask.view(of_x.shape).to(of_x.dtype)).mul_(masks.share(p))
    return of_x, of_A, of_B
