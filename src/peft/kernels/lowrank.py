"""Low-rank updates that keep little for the backward pass, each beside its plain form.

Letters: N tokens, d in-features, k out-features, r rank. x is (..., d), y is (..., k), A is (r, d), B is (k, r).

The plain forms are ordinary torch operations: the reference, and what runs under `torch.compile`, `torch.func` and
forward-mode differentiation. The fused forms give the same numbers and save x in its own dtype plus one bit of mask
per element where there is dropout, instead of casts and dropped copies of x. What `linear` runs, the first that fits:

    torch's own tensors on a CPU (`ready`):     A learns            `thin.linear`, one node
                                                one row             `_row`, products with vectors
                                                many rows           one product with `whole.weight`
    a GPU with Triton (`choice`):               dropout, few rows   its form of the same
    dropout, or factors of another dtype:       training            `_linear`, or `masked` where B's gradient needs x
                                                under autocast      `_autocast`
                                                evaluation          `raised`, rounded once
    all else:                                                       `slim.onto` the product with W
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import _C, Tensor
from torch.autograd import forward_ad

from . import choice, masks, slim, thin, whole
from .modes import NARROW, PLAIN, WIDE, changed, is_autocast, node, shaped, transformed, without_autocast


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float = 0.0) -> Tensor:
    """y + scale B A dropout(x), in the dtype of y. The definition that every fused form is held against."""
    x = x.to(A.dtype)
    x = masks.dropout(x, p) if p else x
    return (y + F.linear(F.linear(x, A), B) * scale).to(y.dtype)


def linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Any, p: float = 0.0) -> Tensor:
    """W x + b + scale B A dropout(x): (..., d) -> (..., k), choosing the form that is quick and keeps least.

    W is (k, d) of x's dtype, and frozen where A and B have another dtype or there is dropout.
    """
    found = None if torch.compiler.is_compiling() else ready(x, W, b, A, B, scale, p)
    return generally(x, W, b, A, B, scale, p) if found is None else found


def ready(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Any, p: float = 0.0) -> Tensor | None:
    """`linear` of torch's own tensors on a CPU, outside graphs, A and B in single precision; None for what may be more.

    It is None under autocast, torch.func and forward-mode differentiation, where gradients of other tensors are wanted
    than A's, W's least of all, and in traces, which serve other numbers of rows. One function sees to all of it, as a
    large product leaves none of its callers' code in the caches.
    """
    dtype, wide = x.dtype, A.dtype
    if type(scale) is not float or wide not in WIDE or B.dtype is not wide:
        return None
    if type(x) not in PLAIN or type(W) not in PLAIN or type(A) not in PLAIN or type(B) not in PLAIN:
        return None
    if not (x.is_cpu and A.is_cpu and B.is_cpu) or forward_ad._current_level >= 0 or _C._is_any_autocast_enabled():
        return None
    if _C._functorch.peek_interpreter_stack() is not None or _C._is_tracing() or "cpu" in choice.devices:
        return None
    if torch.is_grad_enabled() and (A.requires_grad or x.requires_grad or B.requires_grad or W.requires_grad):
        fits = A.requires_grad and not W.requires_grad and (dtype is wide or dtype in NARROW)
        return thin.linear(x, W, b, A, B, scale, p) if fits else None
    if p or dtype is not wide or not x.numel():
        return None
    shape = x.shape
    rows = x.numel() // shape[-1]
    if rows == 1 and shape[-1] > 1:  # of a single feature the base's product has other bits
        return _row(x, W, b, A, B, scale)
    if rows * sum(W.shape) >= whole.reach(W, A):
        return F.linear(x, whole.weight(W, A, B, scale), b)
    return None  # the plain form is as quick


def _row(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """A single row, as in decoding, where products of matrices are a long way round.

    The base's part has the bits of F.linear, which ends in the same product.
    """
    v = x.view(-1)
    y = W.mv(v) if b is None else torch.addmv(b, W, v)
    return y.addmv_(B, A.mv(v), alpha=scale).view(*x.shape[:-1], -1)


def generally(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Any, p: float = 0.0) -> Tensor:
    """`linear` where it is not `ready`, and in graphs."""
    if choice.devices and (found := choice.linear(x, W, b, A, B, scale, p)) is not None:
        return found
    if p or A.dtype is not x.dtype:
        if torch.is_grad_enabled() and not (is_autocast(x) or transformed()):
            if _needs_x(x, A, B):
                return masked(F.linear(x, W, b), x, A, B, scale, p)
            return _linear(x, W, b, A, B, scale, p)
        y = F.linear(x, W, b)
        if is_autocast(x):
            return _autocast(y, x, A, B, scale, p)
        if p or torch.is_grad_enabled() or transformed():
            return plain(y, x, A, B, scale, p)
        return raised(y.flatten(0, -2), _down(x, A, B, scale, 0.0)[0], B, scale, True).view(y.shape)
    # the update is accumulated into the product: two operations more than the base, nothing saved beyond x and A x
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if is_autocast(x):
        return _autocast(F.linear(x, W, b), x, A, B, scale, p)
    y, h = F.linear(flat, W, b), F.linear(flat, A) if torch.compiler.is_compiling() else slim.down(flat, A)
    if type(scale) is float and y.dtype is B.dtype and _C._functorch.peek_interpreter_stack() is None:
        y = slim.onto(y, h, B, scale)  # which vmap has no rule for
    else:
        y = (y + F.linear(h, B) * scale).to(y.dtype)
    return y if flat is x else y.view(*x.shape[:-1], y.shape[-1])


def add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float = 0.0) -> Tensor:
    """y + scale B A dropout(x), choosing the form that keeps least."""
    if choice.devices and (found := choice.add(y, x, A, B, scale, p)) is not None:
        return found
    if not p and type(scale) is float and x.dtype is y.dtype is A.dtype is B.dtype and _accumulates(y, x, A, B):
        flat = x.reshape(-1, x.shape[-1])
        h = F.linear(flat, A) if torch.compiler.is_compiling() else slim.down(flat, A)
        return slim.onto(y.reshape(-1, y.shape[-1]), h, B, scale, own=False).view(y.shape)
    if is_autocast(x):
        return _autocast(y, x, A, B, scale, p)
    simple = (not p and x.dtype is A.dtype) or not torch.is_grad_enabled() or transformed()
    if simple or hasattr(A, "placements"):  # DTensors know torch's operations only
        return plain(y, x, A, B, scale, p)
    if _needs_x(x, A, B):
        return masked(y, x, A, B, scale, p)
    return _add(y, x, A, B, scale, p)


def _accumulates(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the update can be added in the product that makes it: two passes over y in place of four."""
    ordinary = all(type(t) in PLAIN for t in (y, x, A, B))
    return ordinary and not (y.is_nested or x.is_nested or A.dim() > 2 or is_autocast(x) or transformed())


def _autocast(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float) -> Tensor:
    """`plain` where autocast chooses the dtype of products: x is cast once, and the update summed where it is made."""
    kinds = (type(t) in PLAIN for t in (y, x, A, B))
    if type(scale) is not float or y.dtype is not torch.get_autocast_dtype(x.device.type) or not all(kinds):
        return plain(y, x, A, B, scale, p)
    if transformed() or A.dim() > 2 or y.is_nested or x.is_nested:
        return plain(y, x, A, B, scale, p)
    if p and torch.is_grad_enabled() and thin.takes(x, A, B, scale):
        with without_autocast(x):  # keeps bits of a mask, and sums in the factors' own dtype
            return (masked if _needs_x(x, A, B) else _add)(y, x.to(y.dtype), A, B, scale, p)
    x = masks.dropout(x, p) if p else x
    h = F.linear(x.reshape(-1, x.shape[-1]), A)
    return torch.addmm(y.reshape(-1, y.shape[-1]), h, B.t(), alpha=scale).view(y.shape)


def masked(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float) -> Tensor:
    """`plain` that keeps bytes for the dropout: nothing else in the size of x where A is frozen."""
    mask = _mask(x, p)
    h = slim.linear((x if mask is None else x * mask.view(x.shape)).to(A.dtype), A)
    return (y + slim.up(h, B) * (scale * masks.share(p))).to(y.dtype)


def _needs_x(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether B's gradient depends on an x that a fused form would not keep, should it be differentiated again."""
    return B.requires_grad and x.requires_grad and not A.requires_grad


def _shrink(x: Tensor, mask: Tensor | None, A: Tensor) -> Tensor:
    """What dropout leaves of x, not yet divided by the share that is kept, in A's dtype, (N, d)."""
    x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return (x if mask is None else x * mask).to(A.dtype)


def _mask(x: Tensor, p: float) -> Tensor | None:
    """Which elements dropout keeps, (N, d) of 0 and 1, one byte an element."""
    return masks.draw(_rows(x.shape), p, x.device) if p else None


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """(N, d) of an input."""
    return prod(shape[:-1]), shape[-1]


def _down(x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float) -> tuple[Tensor, Tensor | None]:
    """(h, (N, r), the packed mask) of an input (..., d); h is not yet divided by the share that is kept."""
    if thin.takes(x, A, B, scale):
        return thin.down(x.reshape(-1, x.shape[-1]), A, p)
    mask = _mask(x, p)
    return F.linear(_shrink(x, mask, A), A), masks.packed(mask)


def raised(y: Tensor, h: Tensor, B: Tensor, scale: Any, own: bool) -> Tensor:
    """y + scale h B', (N, k) in the dtype of y, which may be changed if it is the caller's own; rounded once."""
    if thin.takes(y, h, B, scale):
        return thin.onto(y, h, B, scale, own)
    if isinstance(scale, Tensor):
        return (y + F.linear(h, B) * scale).to(y.dtype)
    if y.dtype is h.dtype:
        return changed(y, "addmm", h, B.mT, alpha=scale) if own else torch.addmm(y, h, B.mT, alpha=scale)
    if torch.promote_types(y.dtype, h.dtype) is h.dtype:  # a sum of two dtypes costs more than two casts
        return changed(y.to(h.dtype), "addmm", h, B.mT, alpha=scale).to(y.dtype)
    return torch.add(y, F.linear(h, B), alpha=scale)


def _low_rank_grads(
    ctx: Any,
    needs: Sequence[bool],
    g: Tensor,
    x: Tensor | None,
    mask: Tensor | None,
    A: Tensor,
    B: Tensor,
    h: Any,
    beside: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of scale B A (mask x) with respect to x, (N, d), A and B for an incoming g of (N, k) in A's dtype.

    x may be None where A is frozen and h was kept; h may be None where x was kept. `beside`, of A's dtype and the
    caller's own, is added to the gradient of x.
    """
    need_x, need_A, need_B = needs
    if torch.is_grad_enabled() and x is not None:
        h = None  # the gradients are differentiated again, and a number that was kept does not depend on x and A
    dropped = _shrink(x, mask, A) if x is not None and (need_A or h is None) else None
    grad_A = grad_B = grad_x = None
    grad_h = (g @ B) * ctx.scale
    if need_B:
        h = dropped @ A.mT if h is None and dropped is not None else h
        grad_B = (g.mT @ h) * ctx.scale if h is not None else None
    if need_A and dropped is not None:
        grad_A = grad_h.mT @ dropped
    if need_x and mask is None and beside is not None:
        grad_x = beside.addmm_(grad_h, A)
    elif need_x:
        grad_x = grad_h @ A
        grad_x = grad_x if mask is None else grad_x.mul_(mask)
        grad_x = grad_x if beside is None else grad_x.add_(beside)
    return grad_x, grad_A, grad_B


def _in_blocks(ctx: Any, g: Tensor, x: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether `thin` may compute the gradients: they are not differentiated again."""
    return not torch.is_grad_enabled() and all(thin.takes(t, A, B, ctx.scale) for t in (g, x) if t is not None)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


class _Linear(torch.autograd.Function):
    """W x + b + scale B A dropout(x) with a frozen W; saves x, the mask and h = A dropout(x).

    The gradient of x is accumulated in place, so that there is no second one to add to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Any, p: float) -> Tensor:
        ctx.scale, ctx.shape = scale * masks.share(p), x.shape
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, W, b)
        h, bits = _down(flat, A, B, ctx.scale, p)
        y = raised(y, h, B, ctx.scale, True)
        needs_A, needs_B = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        ctx.save_for_backward(x if needs_A else None, bits, W, A, B, h if needs_B else None)
        return shaped(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bits, W, A, B, h = ctx.saved_tensors
        needs, g = ctx.needs_input_grad, grad.reshape(-1, grad.shape[-1])
        grad_b = g.sum(0) if needs[2] else None
        if _in_blocks(ctx, g, x, A, B):
            back, of_B = thin.of_h(g, B, h, ctx.scale)
            of_x, of_A = thin.of_x(back, _flat(x), bits, A, g.dtype if needs[0] else None)
            of_x = None if of_x is None else of_x.addmm_(g, W).view(ctx.shape)
            return of_x, None, grad_b, of_A, of_B, None, None
        mask = masks.unpacked(bits, _rows(ctx.shape))
        beside = (g @ W).to(A.dtype) if needs[0] and g.dtype is not A.dtype else None
        part, *grads = _low_rank_grads(ctx, (needs[0], *needs[3:5]), g.to(A.dtype), x, mask, A, B, h, beside)
        if part is not None:
            part = (part.addmm_(g, W) if beside is None else part.to(g.dtype)).view(ctx.shape)
        return part, None, grad_b, *grads, None, None


class _Add(torch.autograd.Function):
    """y + scale B A dropout(x); saves x, the mask and h = A dropout(x)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float) -> Tensor:
        ctx.scale = scale * masks.share(p)
        h, bits = _down(x, A, B, ctx.scale, p)
        # where only B learns, x is not needed; where only A learns, h is not
        needs_A, needs_B = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(x if needs_A else None, bits, A, B, h if needs_B else None)
        return shaped(raised(y.reshape(-1, y.shape[-1]), h, B, ctx.scale, False), y.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bits, A, B, h = ctx.saved_tensors
        g, to_y = grad.reshape(-1, grad.shape[-1]), grad if ctx.needs_input_grad[0] else None
        if _in_blocks(ctx, g, x, A, B):
            back, of_B = thin.of_h(g, B, h, ctx.scale)
            of_x, of_A = thin.of_x(back, _flat(x), bits, A, ctx.x_dtype if ctx.needs_input_grad[1] else None)
            return to_y, None if of_x is None else of_x.view(ctx.shape), of_A, of_B, None, None
        mask = masks.unpacked(bits, _rows(ctx.shape))
        part, *grads = _low_rank_grads(ctx, ctx.needs_input_grad[1:4], g.to(A.dtype), x, mask, A, B, h)
        grad_x = None if part is None else part.to(ctx.x_dtype).view(ctx.shape)
        return to_y, grad_x, *grads, None, None


_linear, _add = node(_Linear), node(_Add)


def compressed(x: Tensor, A: Tensor, v: Tensor, scale: float) -> Tensor:
    """A x for x (N, d), which keeps for A's gradient the groups of x along v (m) only: N d / m numbers."""
    return _Compressed.apply(x, A, v, scale)


def compressed_by(
    apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, axis: int, A: Tensor, v: Tensor, s: float
) -> Tensor:
    """`compressed` where `apply` is linear in x and A otherwise, as a convolution is; features are on `axis`."""
    if transformed():
        return plain_compressed(apply, x, axis, A, v, s)
    return _CompressedBy.apply(apply, x, axis, A, v, s)


def plain_compressed(
    apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, axis: int, A: Tensor, v: Tensor, s: float
) -> Tensor:
    """The same from plain operations: the value and x's gradient of one product, A's gradient of another."""
    estimate = apply(rebuilt(groups(x.detach(), axis, len(v)) @ v, axis, v * s, x.shape[axis]), A)
    return apply(x, A.detach()) + (estimate - estimate.detach())


def groups(x: Tensor, axis: int, size: int) -> Tensor:
    """The features of x, on `axis`, in groups of `size` behind all other axes; the last one with zeros."""
    x = x.movedim(axis, -1)
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def rebuilt(c: Tensor, axis: int, v: Tensor, features: int) -> Tensor:
    """What stands for the input whose groups have the components c along v."""
    return (c[..., None] * v).flatten(-2)[..., :features].movedim(-1, axis)


class _CompressedBy(torch.autograd.Function):
    """A applied to x; saves c = x_group . v, and applies A to scale c v once more, for the gradients alone."""

    @staticmethod
    def forward(
        ctx: Any, apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, axis: int, A: Tensor, v: Tensor, s: float
    ) -> Tensor:
        ctx.product, ctx.axis, ctx.scale, ctx.features = apply, axis, s, x.shape[axis]
        ctx.save_for_backward(groups(x, axis, len(v)) @ v, A, v)
        return apply(x, A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        c, A, v = ctx.saved_tensors
        need = ctx.needs_input_grad
        x = rebuilt(c, ctx.axis, v * ctx.scale, ctx.features).detach().requires_grad_(need[1])
        A = A.detach().requires_grad_(need[3])
        wanted = [t for t in (x, A) if t.requires_grad]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.product(x, A), wanted, grad))  # x's does not depend on x
        return None, next(found) if need[1] else None, None, next(found) if need[3] else None, None, None


class _Compressed(torch.autograd.Function):
    """A x; saves c = x_group . v, and takes scale c v for x in A's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(groups(x, -1, len(v)) @ v, A, v)
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        c, A, v = ctx.saved_tensors
        grad, c = grad.to(A.dtype), c.to(A.dtype)  # autocast may have made both
        grad_x = grad @ A if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        grad_A = ((grad.mT @ c)[..., None] * (v * ctx.scale)).reshape(len(A), -1).narrow(1, 0, A.shape[1])
        return grad_x, grad_A, None, None
