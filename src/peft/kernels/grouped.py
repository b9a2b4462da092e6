"""Low-rank updates of rows that are sorted by adapter: batched products for all adapters at once.

Letters: S adapters, c rows of each, d in-features, k out-features, r rank. x is (N, d), y is (N, k), A is (S, r, d).
`at` says which rows of x come in which order (`core.rows.Segments`): S, `rows`, `real` and `to`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import halves, slim
from .again import batched, differentiable
from .modes import PLAIN, WIDE, changed, is_autocast, reused, shaped, transformed

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}  # integers as wide
FEW = 8  # rows of an adapter, up to which a factor that stands is multiplied with them, not they with it lying


def taken(x: Tensor, at: Any) -> Tensor:
    """The rows of x, (N, ..., d), by adapter: (S, c, d)."""
    rows = x if at.rows is None else x.index_select(0, at.rows)
    return rows.reshape(len(at.members), -1, x.shape[-1])


def shrunk(z: Tensor, A: Tensor) -> Tensor:
    """A z of each adapter, (S, c, r), whose memory lies in whichever order is quicker."""
    return torch.bmm(A, z.mT).mT if z.shape[1] > A.shape[1] else torch.bmm(z, A.mT)


def placed(y: Tensor, u: Tensor, at: Any, own: bool) -> Tensor:
    """y with (S, c, k) added to the rows that they belong to; in y itself if that is nobody else's."""
    u = u.reshape((y if at.rows is None else at.rows).shape[0], *y.shape[1:])  # which may be of no positions
    if at.real is not None:
        u = u.index_select(0, at.real)
    own = own and not reused()
    if u.dtype is not y.dtype:
        return y.index_copy(0, at.to, (y.index_select(0, at.to) + u).to(y.dtype))
    return y.index_add_(0, at.to, u) if own else y.index_add(0, at.to, u)


def add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, at: Any, own: bool = False) -> Tensor:
    """y and B A x of each row, for B (S, r, k) that has the scaling in it. The definition.

    Arguments:
        y: (N, ..., k).
        x: (N, ..., d).
        A, B: the factors.
        at: which rows are under which.
        own: whether y may be written.
    """
    rows = at.rows
    z = (x if rows is None else x.index_select(0, rows)).reshape(A.shape[0], -1, x.shape[-1])
    z = z if z.dtype is A.dtype else z.to(A.dtype)
    h = torch.bmm(A, z.mT).mT if z.shape[1] > A.shape[1] else torch.bmm(z, A.mT)  # `shrunk`, one call less
    if rows is None and y.dtype is h.dtype is B.dtype:
        flat = y.reshape(at.adapters, -1, y.shape[-1])
        return (changed(flat, "baddbmm", h, B) if own else torch.baddbmm(flat, h, B)).view(y.shape)
    u = torch.bmm(h, B)
    if own and at.real is None and u.dtype is y.dtype:
        return changed(y, "index_add", 0, at.to, u.view(-1, *y.shape[1:]))
    return placed(y, u, at, own)


def ordered(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, at: Any, back: Tensor) -> Tensor:
    """`add` to W x + b, which is computed in the adapters' order, too, so that the update is added where it lies.

    Arguments:
        x: (N, ..., d).
        W, b: (k, d) and (k,), or None.
        A, B: the factors, all in one dtype with x and W.
        at: which rows are under which; every row under one, and as many under each.
        back: from that order to the batch's, (N,).
    """
    z = x.index_select(0, at.rows)
    y = F.linear(z, W, b)
    z = z.view(A.shape[0], -1, x.shape[-1])
    h = torch.bmm(A, z.mT).mT if z.shape[1] > A.shape[1] else torch.bmm(z, A.mT)
    y = changed(y.view(A.shape[0], -1, y.shape[-1]), "baddbmm", h, B).view(y.shape)
    return y.index_select(0, back)


def gained(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, G: Tensor, b: Tensor | None, at: Any, own: bool = False
) -> Tensor:
    """g (y - b) + b + B A x of each row, for g (S, k) and B that has g and the scaling in it; the rest as for `add`."""
    u = torch.bmm(shrunk(taken(x, at).to(A.dtype), A), B)
    z = taken(y, at)
    z = (z if b is None else z - b).to(u.dtype)
    return placed(y, torch.addcmul(u, z, (G - 1)[:, None]), at, own)


def suits(A: Tensor, adapters: int, rows: int) -> bool:
    """Whether so many adapters of a bank, A (S, r, d), are quicker `beside` each other for that many rows of d.

    Each row is then multiplied with the factors of all; what that costs is small where these are few, or the rows.
    """
    r = A.shape[1]
    wide = adapters * r
    if not A.is_cpu or A.dtype not in BITS:
        return False
    most = 256 if A.dtype is halves.HALF and halves.matrix_units() else 32
    return wide <= most or rows * (wide - r) <= 2048


def beside(y: Tensor, x: Tensor, A: Tensor, B: Tensor, mine: Tensor, own: bool = False) -> Tensor:
    """`add` for factors that stand side by side.

    Arguments:
        y: (N, ..., k).
        x: (N, ..., d).
        A: (d, S r).
        B: (S r, k) with the scaling in it; finite, as the products of other adapters with it are zeros.
        mine: (N, S r) of integers as wide as A's numbers, whose bits are all set where a column is the row's own.
        own: whether y may be written.
    """
    lone = x.dim() == 2
    z, flat = (x, y) if lone else (x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
    h = torch.mm(z if z.dtype is A.dtype else z.to(A.dtype), A)
    if h.dtype is not A.dtype:  # as autocast may choose
        h = h.to(A.dtype)
    if lone:
        h.view(mine.dtype).bitwise_and_(mine)  # zeros, whatever was there
    else:
        h.view(mine.shape[0], x.shape[1:-1].numel(), h.shape[1]).view(mine.dtype).bitwise_and_(mine[:, None])
    if flat.dtype is not B.dtype:
        u = torch.mm(h, B)
        out = flat.add_(u) if own else (flat + u).to(flat.dtype)
    else:
        out = flat.addmm_(h, B) if own else flat.addmm(h, B)
    return out if lone else out.view(y.shape)


def stacked(As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """A (S, r, d) and B (S, r, k) with its scaling, of factors (r, d) and (k, r); zeros fill up ranks."""
    rank = max(len(A) for A in As)
    A = torch.stack([F.pad(A, (0, 0, 0, rank - len(A))) if len(A) < rank else A for A in As])
    B = torch.stack([F.pad(B.mT, (0, 0, 0, rank - B.shape[1])) if B.shape[1] < rank else B.mT for B in Bs])
    if len(set(scales)) == 1:  # tensors count for themselves
        return A, B if type(scales[0]) is float and scales[0] == 1.0 else B * scales[0]
    factors = [torch.as_tensor(s, dtype=B.dtype, device=B.device).reshape(1, 1) for s in scales]
    return A, B * torch.stack(factors)


def learnt(y: Tensor | None, x: Tensor, W: Tensor | None, A: Tensor) -> bool:
    """Whether `update` may be taken for factors like A, all leaves that learn: of one exact dtype, over a frozen W."""
    kinds = all(t is None or (type(t) in PLAIN and t.dtype is A.dtype) for t in (y, x, W))
    frozen = W is None or not W.requires_grad
    return kinds and frozen and A.dtype in WIDE and not (is_autocast(x) or transformed())


def plain(y: Tensor | None, x: Tensor, W: Any, b: Tensor | None, at: Any, scale: float, *factors: Tensor) -> Tensor:
    """`update` of ordinary operations."""
    S = at.adapters
    y = F.linear(x, W, b) if y is None else y
    return add(y, x, *stacked(factors[:S], factors[S:], [scale] * S), at)


def update(y: Tensor | None, x: Tensor, W: Any, b: Tensor | None, at: Any, scale: float, *factors: Tensor) -> Tensor:
    """y + scale B A x, where y is W x + b if it is None, as one node of the graph for all adapters.

    Arguments:
        y: (N, ..., k), or None.
        x: (N, ..., d).
        W, b: (k, d) and (k,) where y is None.
        at: which rows are under which.
        scale: the same for all.
        factors: A (r, d) of each adapter, then B (k, r) of each. Their gradients are slices of one tensor.
    """
    # past what torch does to every argument for torch.func, under which this is never called
    return super(torch.autograd.Function, _Update).apply(y, x, W, b, at, scale, *factors)


class _Update(torch.autograd.Function):
    """Saves x, A x of the rows in their order, and the factors in one tensor each."""

    @staticmethod
    def forward(
        ctx: Any, y: Any, x: Tensor, W: Any, b: Tensor | None, at: Any, scale: float, *factors: Tensor
    ) -> Tensor:
        S = at.adapters
        A, B = torch.stack(factors[:S]), torch.stack(factors[S:])
        h = shrunk(taken(x, at), A)
        h = h if scale == 1.0 else h * scale
        ctx.at, ctx.scale, ctx.rest = at, scale, (y, b, factors)
        ctx.save_for_backward(x, W, h, A, B)
        lying = h.shape[1] > FEW or not halves.matrix_units()  # MKL has other products for the processors of others
        u = torch.bmm(h, B.mT) if lying else torch.bmm(B, h.mT).mT
        made = F.linear(x.reshape(-1, x.shape[-1]), W, b) if y is None else y
        made = made if y is not None or x.dim() == 2 else shaped(made, x.shape[:-1])
        return placed(made, u, at, y is None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, h, A, B = ctx.saved_tensors
        at, (y, b, factors), needs = ctx.at, ctx.rest, ctx.needs_input_grad
        if torch.is_grad_enabled() or batched(grad):

            def plainly(y: Any, x: Tensor, b: Any, *factors: Tensor) -> Tensor:
                return plain(y, x, W, b, at, ctx.scale, *factors)

            wanted = (*needs[:2], needs[3], *needs[6:])
            of_y, of_x, of_b, *rest = differentiable(plainly, (y, x, b, *factors), wanted, grad)
            return of_y, of_x, None, of_b, None, None, *rest
        g = _spread(grad, at)
        of_B = slim.outers(g, h).unbind(0)
        g = slim.backs(g, B)
        g = g if ctx.scale == 1.0 else g * ctx.scale
        of_A = torch.bmm(g.mT, taken(x, at)).unbind(0)
        of_x = None
        if needs[1]:
            of_x = torch.zeros_like(x) if W is None else torch.matmul(grad, W)
            of_x = placed(of_x, torch.bmm(g, A), at, True)
        of_b = grad.reshape(-1, grad.shape[-1]).sum(0) if needs[3] else None
        return grad if needs[0] else None, of_x, None, of_b, None, None, *of_A, *of_B


def _spread(grad: Tensor, at: Any) -> Tensor:
    """`taken` of an output's gradient, with zeros for what is a repetition."""
    if at.real is None:
        return taken(grad, at)
    rows = grad.new_zeros(len(at.rows), *grad.shape[1:]).index_copy_(0, at.real, grad.index_select(0, at.to))
    return rows.reshape(at.adapters, -1, grad.shape[-1])
