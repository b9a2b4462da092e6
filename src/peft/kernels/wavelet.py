"""One level of a separable wavelet transform: of a whole matrix, and of the features of activations.

Letters: a pair of filters is (2, L), of even L; low and high halves of H numbers give 2 H - L + 2; x is (N, I).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def placed(at: Tensor, out: int, inp: int, length: int) -> tuple[Tensor, tuple[int, int]]:
    """Where places of an (out, inp) matrix, (2, n), stand in S, which is larger by what filters overlap; S's shape."""
    height, width = (n + length - 2 + (n + length) % 2 for n in (out, inp))
    return torch.stack([at[0] + (height - out) // 2, at[1] + (width - inp) // 2]), (height, width)


def separate(at: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The places in the matrix between the transforms of two axes: there two quarters of S have changed places."""
    (row, column), (h, w) = at, (sizes[0] // 2, sizes[1] // 2)
    return row % h + column // w * h, column % w + row // h * w


def inverse(S: Tensor, pair: Tensor) -> Tensor:
    """One level of the inverse transform of (..., H, W), both even: approximation, and details of rows, columns, both.

    In the four quarters of S the details of rows stand on the right and those of columns below.
    """
    (a, rows), (columns, both) = (half.chunk(2, -1) for half in S.chunk(2, -2))
    left, right = columnwise(a, rows, pair), columnwise(columns, both, pair)
    return columnwise(left.mT, right.mT, pair).mT


def columnwise(low: Tensor, high: Tensor, pair: Tensor) -> Tensor:
    """Reconstruct (..., 2 n - L + 2, m) along the next to last axis from two halves (..., n, m)."""
    if low.is_cpu and not torch.compiler.is_compiling():
        return _by_taps(low, high, [tap.unbind() for tap in pair.unbind(-1)])
    both = torch.stack([low, high], -3).reshape(-1, 2, *low.shape[-2:])
    length = pair.shape[-1]
    found = F.conv_transpose2d(both, pair.view(2, 1, length, 1), stride=(2, 1), padding=(length - 2, 0))
    return found.view(*low.shape[:-2], *found.shape[-2:])


def _by_taps(low: Tensor, high: Tensor, taps: Sequence[Sequence[Tensor]]) -> Tensor:
    """The same, in sums of the halves: a convolution of few channels leaves a processor's vectors empty."""
    last, n, parts = len(taps) // 2 - 1, low.shape[-2], []
    for phase in (taps[0::2], taps[1::2]):
        made = (torch.addcmul(low * a, high, b) for a, b in phase)
        moved = [F.pad(t, (0, 0, q, last - q)) if last else t for q, t in enumerate(made)]
        parts.append(sum(moved[1:], moved[0]))
    return torch.stack(parts, -2).flatten(-3, -2)[..., 2 * last : 2 * n, :]


def synthesis(t: Tensor, pair: Tensor) -> Tensor:
    """Features, (N, 2 H - L + 2), of both halves below each other, (2 H, N): `columnwise`, by products of matrices."""
    length, half, rows = pair.shape[-1], t.shape[0] // 2, t.shape[-1]
    taps = (pair.mT @ t.reshape(2, -1)).view(length // 2, 2, half, rows)
    last = length // 2 - 1
    # a tap 2 q + e of the number h stands at 2 (h + q) + e
    total = torch.stack([F.pad(t, (0, 0, q, last - q)) for q, t in enumerate(taps)]).sum(0) if last else taps[0]
    return total.permute(2, 1, 0).reshape(rows, -1)[:, length - 2 :][:, : 2 * half - length + 2]


def analysis(x: Tensor, pair: Tensor) -> Tensor:
    """Both halves of features x, below each other, (2 H, N): the transpose of `synthesis`, x filled up with zeros."""
    length, (rows, size) = pair.shape[-1], x.shape
    half = (size + length - 1) // 2
    room = (length - 2, 2 * half + length - 2 - (length - 2) - size)
    x = F.pad(x, room) if any(room) else x
    windows = x.unfold(-1, length, 2) if length > 2 else x.unflatten(-1, (-1, 2))
    return (pair @ windows.permute(2, 1, 0).reshape(length, -1)).view(2 * half, rows)
