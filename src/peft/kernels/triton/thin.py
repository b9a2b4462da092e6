"""The products with a thin factor, on the device. `launch` calls them.

Letters: N tokens, d in-features, k out-features, r rank (of a slot), R the ranks of a bank in all. A is (R, d). Tokens
are numbered as in `segments`; without segments all belong to slot 0. h is (SPLIT, N, width) in float32: the sum over d
is shared out to SPLIT programs, and who reads h adds them up, so that the result does not depend on their order.
Dropout is drawn by philox from the seed and the number of the element, so each kernel that is given the same seed finds
the same mask and none is stored.
"""

from __future__ import annotations

from .language import jit, tl


@jit
def stays(seed, token, column, width, rate):
    """Which elements dropout keeps, (tokens, columns)."""
    return tl.rand(tl.load(seed), token[:, None] * width + column[None, :]) >= rate


@jit
def extent(tiles, starts, count, rank, tile, SEGMENTED: tl.constexpr, BLOCK: tl.constexpr):
    """(slot, first token, the one after the last, first row in the bank, rank)."""
    if SEGMENTED:
        slot = tl.load(tiles + 3 * tile)
        known = tl.maximum(slot, 0)
        start = tl.load(starts + known)
        found = tl.load(starts + known + 1) - start
        first, last = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    else:
        slot, start, found, first, last = 0, 0, rank, tile * BLOCK, tl.minimum(tile * BLOCK + BLOCK, count)
    return slot, first, last, start, found


@jit
def places(index, positions, n, live, INDEXED: tl.constexpr):
    """Where in the batch the tokens n stand, int64."""
    if INDEXED:
        row = tl.load(index + n // positions, mask=live, other=0)
        return row.to(tl.int64) * positions + n % positions
    else:
        return n.to(tl.int64)


@jit
def shrink(
    x, A, h, seed, index, tiles, starts, count, width, rank, positions, rate,
    DROP: tl.constexpr, SEGMENTED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h = A dropout(x), not divided by the share that dropout keeps."""
    tile, part = tl.program_id(0), tl.program_id(1)
    slot, first, last, start, own = extent(tiles, starts, count, rank, tile, SEGMENTED, BLOCK_N)
    if slot < 0:
        return
    n, i = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    live = n < last
    token = places(index, positions, n, live, SEGMENTED)
    below = (start + i).to(tl.int64)[None, :] * width
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for at in range(part * BLOCK_D, width, SPLIT * BLOCK_D):
        c = at + tl.arange(0, BLOCK_D)
        inside = c < width
        v = tl.load(x + token[:, None] * width + c[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if DROP:
            v = tl.where(stays(seed, token, c, width, rate), v, 0.0)
        a = tl.load(A + below + c[:, None], mask=inside[:, None] & (i < own)[None, :], other=0.0)
        total = tl.dot(v.to(a.dtype), a, total, input_precision=PRECISION)
    place = (part * count + n).to(tl.int64)[:, None] * rank + i[None, :]
    tl.store(h + place, total, mask=live[:, None] & (i < rank)[None, :])


@jit
def summed(h, n, live, count, rank, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """h of the tokens n, (BLOCK_N, BLOCK_R), the parts added up."""
    i = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for part in tl.static_range(SPLIT):
        place = (part * count + n).to(tl.int64)[:, None] * rank + i[None, :]
        total += tl.load(h + place, mask=live[:, None] & (i < rank)[None, :], other=0.0)
    return total


@jit
def finished(y, update, gain, bias, c, inside, GAIN: tl.constexpr, BIAS: tl.constexpr):
    """y + update, or gain (y - bias + update) + bias, in float32."""
    y = y.to(tl.float32)
    if GAIN:
        g = tl.load(gain + c, mask=inside, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
            return (y - b + update) * g + b
        else:
            return (y + update) * g
    else:
        return y + update


@jit
def expand(
    h, B, y, out, gain, bias, seed, index, tiles, starts, count, width, rank, positions, across, down, scale, rate,
    DROP: tl.constexpr, SEGMENTED: tl.constexpr, SPLIT: tl.constexpr, GAIN: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = y + scale B h, with dropout's mask over the update, or DoRA's gain over all; out may be y itself.

    B's element of out-feature c and rank i stands at c across + i down.
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, first, last, start, own = extent(tiles, starts, count, rank, tile, SEGMENTED, BLOCK_N)
    if slot < 0:
        return
    n, i, c = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R), block * BLOCK_D + tl.arange(0, BLOCK_D)
    live, inside = n < last, c < width
    token = places(index, positions, n, live, SEGMENTED)
    down_to = (start + i).to(tl.int64)[:, None] * down
    b = tl.load(B + down_to + c[None, :] * across, mask=(i < own)[:, None] & inside[None, :], other=0.0)
    thin = summed(h, n, live, count, rank, SPLIT, BLOCK_N, BLOCK_R)
    update = tl.dot(thin.to(b.dtype), b, input_precision=PRECISION) * scale
    if DROP:
        update = tl.where(stays(seed, token, c, width, rate), update, 0.0)
    place, both = token[:, None] * width + c[None, :], live[:, None] & inside[None, :]
    value = finished(tl.load(y + place, mask=both, other=0.0), update, gain, bias, c, inside, GAIN, BIAS)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=both)


@jit
def outer(
    u, v, out, seed, index, spans, starts, count, width, rank, total, positions, scale, rate,
    DROP: tl.constexpr, SEGMENTED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = scale u' dropout(v) for each slot: (SPLIT, R, d) of u (N, rank) in float32 and v (N, d), taken as KIND."""
    span, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SEGMENTED:
        _slot, first, last, start, own = extent(spans, starts, count, rank, span, True, 1)
    else:
        first, last, start, own = 0, count, 0, rank
    i, c = tl.arange(0, BLOCK_R), block * BLOCK_D + tl.arange(0, BLOCK_D)
    mine, inside = i < own, c < width
    found = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for at in range(first + part * BLOCK_N, last, SPLIT * BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        live = n < last
        token = places(index, positions, n, live, SEGMENTED)
        left = tl.load(u + n.to(tl.int64)[None, :] * rank + i[:, None], mask=mine[:, None] & live[None, :], other=0.0)
        right = tl.load(v + token[:, None] * width + c[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if DROP:
            right = tl.where(stays(seed, token, c, width, rate), right, 0.0)
        found = tl.dot(left.to(KIND), right.to(KIND), found, input_precision=PRECISION)
    place = (part * total + start + i).to(tl.int64)[:, None] * width + c[None, :]
    tl.store(out + place, found * scale, mask=mine[:, None] & inside[None, :])


@jit
def few(
    x, A, B, y, count, width, features, rank, across, down, scale,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y += scale B A x for a few tokens, in one launch: each program computes all of h for its own out-features."""
    n, i = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    c = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    live, mine, inside = n < count, i < rank, c < features
    thin = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for at in range(0, width, BLOCK_D):
        j = at + tl.arange(0, BLOCK_D)
        v = tl.load(x + n[:, None] * width + j[None, :], mask=live[:, None] & (j < width)[None, :], other=0.0)
        a = tl.load(A + i[None, :] * width + j[:, None], mask=mine[None, :] & (j < width)[:, None], other=0.0)
        thin = tl.dot(v.to(a.dtype), a, thin, input_precision=PRECISION)
    b = tl.load(B + i[:, None] * down + c[None, :] * across, mask=mine[:, None] & inside[None, :], other=0.0)
    update = tl.dot(thin.to(b.dtype), b, input_precision=PRECISION) * scale
    place, both = n[:, None] * features + c[None, :], live[:, None] & inside[None, :]
    value = tl.load(y + place, mask=both, other=0.0).to(tl.float32) + update
    tl.store(y + place, value.to(y.dtype.element_ty), mask=both)


@jit
def mask(out, seed, count, width, rate, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dropout's mask as bytes of 0 and 1, (N, d), for who needs it whole."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = n.to(tl.int64)
    both = (n < count)[:, None] & (c < width)[None, :]
    kept = stays(seed, token, c, width, rate)
    tl.store(out + token[:, None] * width + c[None, :], kept.to(tl.uint8), mask=both)
