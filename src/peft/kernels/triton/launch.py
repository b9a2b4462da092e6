"""Calling the kernels of `thin`: block sizes, grids, and the tensors that they fill.

Letters as in `thin`. Every tensor is contiguous, of one device, in float32, float16 or bfloat16. The block sizes were
chosen by arithmetic and by what fits; they were never timed on a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import thin
from .language import tl
from .segments import TILE, Segments

WIDEST = 128  # the largest rank whose h stands in one block
FEW = 16  # tokens that `few` takes
MANY_PROGRAMS = 256
TILE_BYTES = 16 * 1024  # several of them wait in shared memory


def block(size: int, least: int, most: int) -> int:
    """The power of two that holds a size, between two others."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


def columns_of(width: int, rank: int, kind: torch.dtype) -> int:
    """How many columns of a factor stand in one block, of at most TILE_BYTES."""
    return block(width, 16, min(128, TILE_BYTES // (block(rank, 16, WIDEST) * kind.itemsize)))


def precision(kind: torch.dtype) -> str:
    """How float32 is multiplied: as torch would do it."""
    return "ieee" if kind is not torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's device the current one, which is where Triton launches."""
    if x.device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(x.device)
    return nullcontext() if x.device.index == module.current_device() else module.device(x.device)


def seed_of(x: Tensor) -> Tensor:
    """Where a dropout mask begins, (1,) int64, drawn from the device's own generator; nothing waits for it."""
    return torch.empty(1, dtype=torch.int64, device=x.device).random_()


def shrink(
    x: Tensor, A: Tensor, rank: int, at: Segments | None = None, starts: Any = None, seed: Any = None, rate: float = 0.0
) -> Tensor:
    """h = A dropout(x), (parts, N, rank) in float32, not divided by the share that dropout keeps.

    Arguments:
        x: (N, d).
        A: (R, d).
        rank: the largest of all slots.
        at, starts: tokens by slot, and the slots of A; None for one.
        seed: of the dropout mask, (1,); None without.
        rate: of dropout.
    """
    width, count = x.shape[1], x.shape[0] if at is None else at.tokens
    rows = TILE if at is not None else block(count, 16, 32)
    programs = -(-count // rows) if at is None else len(at.tiles)
    columns = columns_of(width, rank, torch.float32 if x.dtype is torch.float32 else A.dtype)
    split = block(min(MANY_PROGRAMS // max(programs, 1), width // (2 * columns)), 1, 16)
    h = torch.empty(split, count, rank, dtype=torch.float32, device=x.device)
    if programs and count:
        tables = (None, None, None, 1) if at is None else (at.rows, at.tiles, starts, at.positions)
        index, tiles, starts, positions = tables
        with on(x):
            thin.shrink[(programs, split)](
                x, A, h, seed, index, tiles, starts, count, width, rank, positions, rate,
                DROP=seed is not None, SEGMENTED=at is not None, SPLIT=split, PRECISION=precision(A.dtype),
                BLOCK_N=rows, BLOCK_R=block(rank, 16, WIDEST), BLOCK_D=columns,
            )  # fmt: skip
    return h


def expand(
    h: Tensor, B: Tensor, y: Tensor, scale: float, at: Segments | None = None, starts: Any = None, seed: Any = None,
    rate: float = 0.0, by_rank: bool = False, gain: Tensor | None = None, bias: Tensor | None = None, out: Any = None,
) -> Tensor:  # fmt: skip
    """out = y + scale B h, or gain (y - bias + scale B h) + bias; y itself where no `out` is given.

    Arguments:
        h: (parts, N, rank), float32.
        B: (k, r), or (R, k) where it stands `by_rank`.
        y: (N, k).
        scale: of the update.
        at, starts, seed, rate: as for `shrink`; the mask is (N, k), over the update.
        gain, bias: (k,).
        out: like y.
    """
    split, count, rank = h.shape
    width, out = y.shape[1], y if out is None else out
    rows = TILE if at is not None else block(count, 16, 32)
    programs = -(-count // rows) if at is None else len(at.tiles)
    if not programs or not count:
        return out
    tables = (None, None, None, 1) if at is None else (at.rows, at.tiles, starts, at.positions)
    index, tiles, starts, positions = tables
    columns = columns_of(width, rank, B.dtype)
    with on(y):
        thin.expand[(programs, -(-width // columns))](
            h, B, y, out, gain, bias, seed, index, tiles, starts, count, width, rank, positions,
            *((1, width) if by_rank else (rank, 1)), scale, rate,
            DROP=seed is not None, SEGMENTED=at is not None, SPLIT=split, GAIN=gain is not None, BIAS=bias is not None,
            PRECISION=precision(B.dtype), BLOCK_N=rows, BLOCK_R=block(rank, 16, WIDEST), BLOCK_D=columns,
        )  # fmt: skip
    return out


def outer(
    u: Tensor, v: Tensor, total: int, kind: torch.dtype, scale: float = 1.0, at: Segments | None = None,
    starts: Any = None, seed: Any = None, rate: float = 0.0,
) -> Tensor:  # fmt: skip
    """scale u' dropout(v) of each slot, (R, d) in float32.

    Arguments:
        u: (N, rank), float32, tokens by slot.
        v: (N, d), as the batch has it.
        total: R.
        kind: what is multiplied in.
        scale, at, starts, seed, rate: as for `shrink`.
    """
    (count, rank), width = u.shape, v.shape[1]
    rows, columns = block(count, 16, 32), block(width, 16, 64)
    spans = 1 if at is None else len(at.spans)
    blocks = -(-width // columns)
    split = block(min(MANY_PROGRAMS // max(spans * blocks, 1), count // (4 * rows)), 1, 64)
    out = torch.empty(split, total, width, dtype=torch.float32, device=v.device)
    if spans and total:
        tables = (None, None, None, 1) if at is None else (at.rows, at.spans, starts, at.positions)
        index, table, starts, positions = tables
        with on(v):
            thin.outer[(spans, blocks, split)](
                u, v, out, seed, index, table, starts, count, width, rank, total, positions, scale, rate,
                DROP=seed is not None, SEGMENTED=at is not None, SPLIT=split, PRECISION=precision(kind),
                KIND=KINDS[kind], BLOCK_N=rows, BLOCK_R=block(rank, 16, WIDEST), BLOCK_D=columns,
            )  # fmt: skip
    return out[0] if split == 1 else out.sum(0)


def few(x: Tensor, A: Tensor, B: Tensor, y: Tensor, scale: float) -> Tensor:
    """y + scale B A x in y itself, for at most FEW tokens: x (N, d), A (r, d), B (k, r), y (N, k)."""
    rank, width = A.shape
    columns = block(y.shape[1], 16, 64)
    with on(x):
        thin.few[(-(-y.shape[1] // columns),)](
            x, A, B, y, x.shape[0], width, y.shape[1], rank, rank, 1, scale,
            PRECISION=precision(A.dtype), BLOCK_N=FEW, BLOCK_R=block(rank, 16, WIDEST),
            BLOCK_D=columns_of(width, rank, A.dtype), BLOCK_K=columns,
        )  # fmt: skip
    return y


def mask(x: Tensor, seed: Tensor, rate: float) -> Tensor:
    """The mask that the other kernels draw for x (N, d): bytes of 0 and 1."""
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    rows, columns = 32, block(x.shape[1], 16, 64)
    grid = (-(-x.shape[0] // rows), -(-x.shape[1] // columns))
    with on(x):
        thin.mask[grid](out, seed, *x.shape, rate, BLOCK_N=rows, BLOCK_D=columns)
    return out


KINDS = {} if tl is None else {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
