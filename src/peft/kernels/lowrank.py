"""Low-rank updates that keep little for the backward pass, each beside its plain form.

Letters: N tokens, d in-features, k out-features, r rank. x is (..., d), y is (..., k), A is (r, d), B is (k, r).

The plain forms are ordinary torch operations: the reference, and what runs under `torch.compile`, `torch.func`,
forward-mode differentiation and autocast. The fused forms give the same numbers and save x in its own dtype plus one
byte of mask per element where there is dropout, instead of casts and dropped copies of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float = 0.0) -> Tensor:
    """y + scale B A dropout(x), in the dtype of y. The definition that every fused form is held against."""
    x = x.to(A.dtype)
    x = F.dropout(x, p) if p else x
    return (y + F.linear(F.linear(x, A), B) * scale).to(y.dtype)


def plain_scaled(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float, gain: Tensor, bias: Tensor | None
) -> Tensor:
    """gain (y - bias + scale B A dropout(x)) + bias, in the dtype of y; gain is (k,)."""
    x = x.to(A.dtype)
    x = F.dropout(x, p) if p else x
    z = y if bias is None else y - bias
    out = (z + F.linear(F.linear(x, A), B) * scale) * gain
    return (out if bias is None else out + bias).to(y.dtype)


def linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Any) -> Tensor:
    """W x + b + scale B A x with the update accumulated into the product: (..., d) -> (..., k).

    W is (k, d); all of one dtype. Two operations more than the base, and nothing saved beyond x and A x.
    """
    flat = x.reshape(-1, x.shape[-1])
    y, h = F.linear(flat, W, b), F.linear(flat, A)
    if type(scale) is float and y.dtype is B.dtype and h.dtype is B.dtype:
        y = y.addmm_(h, B.mT, alpha=scale)
    else:
        y = (y + F.linear(h, B) * scale).to(y.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def transformed() -> bool:
    """True where only plain operations may be used: under compile, torch.func or forward-mode differentiation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float = 0.0) -> Tensor:
    """y + scale B A dropout(x), choosing the form that keeps least."""
    if (not p and x.dtype is A.dtype) or not torch.is_grad_enabled() or _is_autocast(x) or transformed():
        return plain(y, x, A, B, scale, p)
    return _Add.apply(y, x, A, B, scale, p)


def add_scaled(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float, m: Tensor, n: Tensor, b: Tensor | None
) -> Tensor:
    """m / n (y - b + scale B A dropout(x)) + b, the magnitude m and the constant norm n being (k,), the bias b too."""
    if not torch.is_grad_enabled() or _is_autocast(x) or transformed():
        return plain_scaled(y, x, A, B, scale, p, m / n, b)
    return _AddScaled.apply(y, x, A, B, scale, p, m, n, b)


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _shrink(x: Tensor, mask: Tensor | None, keep: float, A: Tensor) -> Tensor:
    """dropout(x) in A's dtype, (N, d)."""
    x = x.flatten(0, -2).to(A.dtype) if x.dim() > 1 else x[None].to(A.dtype)
    return x if mask is None else x * mask * (1.0 / keep)


def _mask(x: Tensor, p: float) -> Tensor | None:
    """Which elements dropout keeps, (N, d) bool: one byte an element."""
    if not p:
        return None
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return torch.empty(rows, x.shape[-1], dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)


def _low_rank_grads(
    ctx: Any, g: Tensor, x: Tensor | None, mask: Tensor | None, A: Tensor, B: Tensor, h: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of scale B A dropout(x) with respect to x, A and B for an incoming g of (N, k) in A's dtype.

    x may be None where A is frozen and h was kept; h may be None where x was kept.
    """
    _, need_x, need_A, need_B = ctx.needs_input_grad[:4]
    dropped = _shrink(x, mask, ctx.keep, A) if x is not None and (need_A or h is None) else None
    grad_A = grad_B = grad_x = None
    grad_h = (g @ B) * ctx.scale
    if need_B:
        h = dropped @ A.mT if h is None and dropped is not None else h
        grad_B = (g.mT @ h) * ctx.scale if h is not None else None
    if need_A and dropped is not None:
        grad_A = grad_h.mT @ dropped
    if need_x:
        grad_x = grad_h @ A
        grad_x = grad_x if mask is None else grad_x * mask * (1.0 / ctx.keep)
        grad_x = grad_x.to(ctx.x_dtype).view(ctx.x_shape)
    return grad_x, grad_A, grad_B


class _Add(torch.autograd.Function):
    """y + scale B A dropout(x); saves x, the mask and h = A dropout(x)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float) -> Tensor:
        mask = _mask(x, p)
        ctx.keep, ctx.scale = 1.0 - p, scale
        h = _shrink(x, mask, ctx.keep, A) @ A.mT
        update = (h @ B.mT).view(y.shape)
        # where only B learns, x is not needed; where only A learns, h is not
        needs_A, needs_B = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(x if needs_A else None, mask, A, B, h if needs_B else None)
        if isinstance(scale, Tensor):
            return (y + update * scale).to(y.dtype)
        return torch.add(y, update, alpha=scale, out=torch.empty_like(y))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, A, B, h = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1]).to(A.dtype)
        grads = _low_rank_grads(ctx, g, x, mask, A, B, h)
        return grad if ctx.needs_input_grad[0] else None, *grads, None, None


class _AddScaled(torch.autograd.Function):
    """gain (y - bias + scale B A dropout(x)) + bias with gain = magnitude / norm.

    Saves x, the mask and z = y - bias + scale B A dropout(x) in y's dtype; h is computed again. The norm is a constant
    of the gradient (DoRA, Liu et al. 2024, arXiv 2402.09353, section 4.3); its owner keeps it alive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scale: Any,
        p: float,
        m: Tensor,
        n: Tensor,
        b: Tensor | None,
    ) -> Tensor:
        mask = _mask(x, p)
        ctx.keep, ctx.scale, ctx.norm = 1.0 - p, scale, n
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        update = ((_shrink(x, mask, ctx.keep, A) @ A.mT) @ B.mT).view(y.shape).mul_(scale)
        z = update.add_(y) if b is None else update.add_(y).sub_(b)
        ctx.save_for_backward(x, mask, A, B, m, z.to(y.dtype))
        out = z * (m / n)
        return (out if b is None else out.add_(b)).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, A, B, m, z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        grad_m = (g.to(m.dtype) * z.reshape(g.shape)).sum(0) / ctx.norm if needs[6] else None
        inner = (g.to(A.dtype) * (m / ctx.norm)).to(A.dtype)
        grads = _low_rank_grads(ctx, inner, x, mask, A, B, None)
        grad_y = inner.to(grad.dtype).view(grad.shape) if needs[0] else None
        grad_b = (g.to(A.dtype).sum(0) - inner.sum(0)).to(grad.dtype) if needs[8] else None
        return grad_y, *grads, None, None, grad_m, None, grad_b
