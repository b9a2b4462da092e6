"""gain (y - b + scale B A dropout(x)) + b, gain = m / n with a constant norm n: DoRA by the kernels.

Letters as in `gain`; m and n are (k,), b too. Source: Liu et al. 2024, arXiv 2402.09353, eq. 5 and section 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..again import batched, differentiable
from . import gain, launch
from .update import How, gradients, mask_of, one, shrunk, whole


def norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """|W + scale B A| of each row of W (k, d), (k,); `squares` are W's, A is (r, d), B (k, r); all but W float32."""
    (features, width), rank = W.shape, A.shape[0]
    out = torch.empty(features, dtype=torch.float32, device=W.device)
    rows = launch.block(features, 16, 32)
    with launch.on(W):
        gain.norms[(-(-features // rows),)](
            W, squares, A, B, A @ A.mT, out, features, width, rank, scale, PRECISION=launch.precision(A.dtype),
            BLOCK_K=rows, BLOCK_R=launch.block(rank, 16, launch.WIDEST), BLOCK_D=launch.block(width, 16, 64),
        )  # fmt: skip
    return out


def add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, rate: float, m: Tensor, n: Tensor, b: Tensor | None
) -> Tensor:
    """m / n (y - b + scale B A dropout(x)) + b for y (..., k), x (..., d), B (k, r)."""
    how = one(x, A.shape[0], scale, rate)
    out = _Gained.apply(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), A, B.mT.contiguous(), how, m, n, b)
    return out.view(y.shape)


def plain(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, how: How, gain: Tensor, b: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The same in torch's operations, for a mask that was drawn."""
    x = (x if mask is None else x * mask).to(A.dtype)
    z = (y if b is None else y - b) + (x @ A.mT @ B) * how.scale
    return (z * gain if b is None else z * gain + b).to(y.dtype)


def back(
    g: Tensor, y: Tensor, h: Tensor, B: Tensor, scale: float, gains: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(gain g in B's dtype, the sum over tokens of g (y - b + scale B h), that of g - gain g), the sums in float32."""
    split, count, rank = h.shape
    width = g.shape[1]
    rows, columns = launch.block(count, 16, 32), launch.block(width, 16, 64)
    blocks = -(-width // columns)
    parts = launch.block(min(launch.MANY_PROGRAMS // blocks, count // (4 * rows)), 1, 64)
    inner = torch.empty(g.shape, dtype=B.dtype, device=g.device)
    of_gain, of_bias = torch.empty(2, parts, width, dtype=torch.float32, device=g.device)
    with launch.on(g):
        gain.back[(blocks, parts)](
            g, y, h, B, gains, b, inner, of_gain, of_bias, count, width, rank, scale,
            SPLIT=split, PARTS=parts, BIAS=b is not None, PRECISION=launch.precision(B.dtype),
            BLOCK_N=rows, BLOCK_R=launch.block(rank, 16, launch.WIDEST), BLOCK_D=columns,
        )  # fmt: skip
    return inner, of_gain.sum(0), of_bias.sum(0)


class _Gained(torch.autograd.Function):
    """Saves y, x, h and the seed; what the update adds to y is computed again."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, how: How, m: Tensor, n: Tensor, b: Tensor | None
    ) -> Tensor:
        h, gains = shrunk(x, A, how), m / n
        ctx.how, ctx.norm = how._replace(seed=None), n
        ctx.save_for_backward(y, x, A, B, whole(h), m, b, how.seed)
        return launch.expand(h, B, y, how.scale, by_rank=True, gain=gains, bias=b, out=torch.empty_like(y))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, x, A, B, h, m, b, seed = ctx.saved_tensors
        how, n, needs = ctx.how._replace(seed=seed), ctx.norm, ctx.needs_input_grad
        if torch.is_grad_enabled() or batched(grad):
            mask = mask_of(x, how)

            def plainly(y: Tensor, x: Tensor, A: Tensor, B: Tensor, m: Tensor, b: Tensor | None) -> Tensor:
                return plain(y, x, A, B, how, m / n, b, mask)

            wanted = (*needs[:4], needs[5], needs[7])
            *found, of_m, of_b = differentiable(plainly, (y, x, A, B, m, b), wanted, grad)
            return *found, None, of_m, None, of_b
        h, gains = h[None], m / n
        inner, of_gain, of_bias = back(grad.contiguous(), y, h, B, how.scale, gains, b)
        found = gradients(inner, x, A, B, h, how, needs[1:4], lambda: torch.zeros_like(x))
        of_m = (of_gain / n).to(m.dtype) if needs[5] else None
        of_b = of_bias.to(b.dtype) if needs[7] else None
        return inner.to(grad.dtype) if needs[0] else None, *found, None, of_m, None, of_b
