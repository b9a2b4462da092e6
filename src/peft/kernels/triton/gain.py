"""The kernels of an update under a gain (DoRA), on the device: the norm without W + s B A, and the backward pass.

Letters as in `thin`; the gain is (k,). The forward pass is `thin.expand`, with the gain as it stores.
"""

from __future__ import annotations

from .language import jit, tl
from .thin import summed


@jit
def norms(
    W, squares, A, B, gram, out, features, width, rank, scale,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|W + s B A| of each row: sqrt(|W_o|^2 + (2 s W A' + s^2 B (A A'))_o . B_o), all but W in float32."""
    c, i = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    inside, mine = c < features, i < rank
    row = c.to(tl.int64)[:, None]
    cross = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for at in range(0, width, BLOCK_D):
        j = at + tl.arange(0, BLOCK_D)
        w = tl.load(W + row * width + j[None, :], mask=inside[:, None] & (j < width)[None, :], other=0.0)
        a = tl.load(A + i[None, :] * width + j[:, None], mask=mine[None, :] & (j < width)[:, None], other=0.0)
        cross = tl.dot(w.to(tl.float32), a, cross, input_precision=PRECISION)
    b = tl.load(B + row * rank + i[None, :], mask=inside[:, None] & mine[None, :], other=0.0)
    square = tl.load(gram + i[:, None] * rank + i[None, :], mask=mine[:, None] & mine[None, :], other=0.0)
    grown = cross * (2 * scale) + tl.dot(b, square, input_precision=PRECISION) * (scale * scale)
    total = tl.load(squares + c, mask=inside, other=0.0) + tl.sum(grown * b, 1)
    tl.store(out + c, tl.sqrt(tl.maximum(total, 0.0)), mask=inside)


@jit
def back(
    g, y, h, B, gain, bias, inner, of_gain, of_bias, count, width, rank, scale,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """inner = gain g, what the gain's gradient is summed from: g (y - bias + s B h), and the bias's: g - inner.

    The sums over the tokens are shared out to PARTS programs, (PARTS, k) in float32. B is (R, k).
    """
    block, part = tl.program_id(0), tl.program_id(1)
    i, c = tl.arange(0, BLOCK_R), block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = c < width
    b = tl.load(B + i[:, None] * width + c[None, :], mask=(i < rank)[:, None] & inside[None, :], other=0.0)
    factor = tl.load(gain + c, mask=inside, other=0.0).to(tl.float32)
    shift = tl.zeros((BLOCK_D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    sum_gain, sum_bias = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for at in range(part * BLOCK_N, count, PARTS * BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        live = n < count
        place, both = n.to(tl.int64)[:, None] * width + c[None, :], live[:, None] & inside[None, :]
        grad = tl.load(g + place, mask=both, other=0.0).to(tl.float32)
        thin = summed(h, n, live, count, rank, SPLIT, BLOCK_N, BLOCK_R)
        z = tl.load(y + place, mask=both, other=0.0).to(tl.float32) - shift[None, :]
        z += tl.dot(thin.to(b.dtype), b, input_precision=PRECISION) * scale
        passed = grad * factor[None, :]
        sum_gain += tl.sum(tl.where(both, grad * z, 0.0), 0)
        sum_bias += tl.sum(grad - passed, 0)
        tl.store(inner + place, passed.to(inner.dtype.element_ty), mask=both)
    tl.store(of_gain + part * width + c, sum_gain, mask=inside)
    tl.store(of_bias + part * width + c, sum_bias, mask=inside)
