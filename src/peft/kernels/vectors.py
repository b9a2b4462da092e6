"""A linear layer with an update of two frozen matrices and a learnt vector after each of them.

Letters: N rows, d in-features, k out-features, r features in between; x is (..., d), W (k, d), A (r, d), B (k, r),
u (r), v (k). What is computed is W x + b + v * B (u * A x). In training on a CPU it is one node of the graph: the
update is added to the product in the pass that multiplies it, the gradient of x is summed within the products. A single
row in evaluation goes through products of a matrix and a vector.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onto, slim
from .again import batched
from .modes import PLAIN, WIDE, changed, eager, node, shaped


def linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, u: Tensor, B: Tensor, v: Tensor) -> Tensor:
    """W x + b + v * B (u * A x); where `core.direct.open_linear` gives W and b."""
    if not _ordinary(x, W, A, u, B, v):
        return plain(x, W, b, A, u, B, v)
    if torch.is_grad_enabled():
        return _linear(x, W, b, A, u, B, v)[0]
    return _row(x, W, b, A, u, B, v) if x.numel() == x.shape[-1] > 1 else plain(x, W, b, A, u, B, v)


def _row(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, u: Tensor, B: Tensor, v: Tensor) -> Tensor:
    """A single row, as in decoding, in products of a matrix and a vector; the base's has the bits of F.linear."""
    flat = x.view(-1)
    y = W.mv(flat) if b is None else torch.addmv(b, W, flat)
    return y.addcmul_(B.mv(A.mv(flat).mul_(u)), v).view(*x.shape[:-1], -1)


def plain(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, u: Tensor, B: Tensor, v: Tensor) -> Tensor:
    """The definition, the update in the dtype of its tensors, which is rounded to that of x at last."""
    return onto.features(F.linear(x, W, b), F.linear(F.linear(x.to(A.dtype), A) * u, B), v)


def _ordinary(x: Tensor, W: Tensor, A: Tensor, u: Tensor, B: Tensor, v: Tensor) -> bool:
    """Whether these are torch's own tensors on a CPU, of one dtype, the matrices frozen, outside graphs."""
    dtype = x.dtype
    if dtype not in WIDE or W.dtype is not dtype or A.dtype is not dtype or B.dtype is not dtype:
        return False
    if u.dtype is not dtype or v.dtype is not dtype or W.requires_grad or A.requires_grad or B.requires_grad:
        return False
    if type(A) not in PLAIN or type(u) not in PLAIN or type(B) not in PLAIN or type(v) not in PLAIN:
        return False
    return x.is_cpu and u.is_cpu and eager()


class _Linear(torch.autograd.Function):
    """Saves A x and B (u * A x), and x not at all.

    A x is an output, too: derivatives of the gradients that hang on x go through it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, u: Tensor, B: Tensor, v: Tensor) -> Any:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y, low = F.linear(flat, W, b), slim.down(flat, A)
        high = F.linear(low * u, B)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(W, A, u, B, v, low, high)
        y = changed(y, "addcmul", high, v)
        return y if flat is x else shaped(y, x.shape[:-1]), low

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_low: Tensor | None) -> Any:
        W, A, u, B, v, low, high = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if grad is None:  # only what hangs on A x
            of_x = None if of_low is None else (of_low @ A).view(ctx.shape)
            return of_x, None, None, None, None, None, None
        g = grad.reshape(-1, grad.shape[-1])
        if torch.is_grad_enabled() or of_low is not None or batched(grad):
            made = g * v
            back = made @ B
            into = back * u if of_low is None else back * u + of_low
            of_x = (g @ W + into @ A).view(ctx.shape) if needs[0] else None
            of_v = (g * F.linear(low * u, B)).sum(0) if needs[6] else None
            return (
                of_x,
                None,
                g.sum(0) if needs[2] else None,
                None,
                (back * low).sum(0) if needs[4] else None,
                None,
                of_v,
            )
        made = g * v
        back = slim.down(made, B.t())
        of_v = torch.mul(g, high, out=made).sum(0) if needs[6] else None
        of_u = (back * low).sum(0) if needs[4] else None
        of_x = torch.mm(g, W).addmm_(back.mul_(u), A).view(ctx.shape) if needs[0] else None
        return of_x, None, g.sum(0) if needs[2] else None, None, of_u, None, of_v


_linear = node(_Linear)
