"""WaveFT: the transform as two products with the matrices of its synthesis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peft import WaveFTConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix

COUNT, SCALING, SEED = 7, 3.0, 5
ROOT = math.sqrt(3)
LOW = {"db1": [1, 1], "db2": [(1 + ROOT) / 4, (3 + ROOT) / 4, (3 - ROOT) / 4, (1 - ROOT) / 4]}


def synthesis(family: str, size: int) -> tuple[Tensor, int]:
    """(size, larger) matrix of the inverse transform of one axis, and where the coefficients of W begin."""
    low = [v / math.sqrt(2) for v in LOW[family]]
    high = [(-1) ** k * v for k, v in enumerate(reversed(low))]
    length = len(low)
    larger = size + length - 2
    larger += larger % 2
    M = torch.zeros(2 * larger, larger, dtype=torch.float64)
    for j in range(larger // 2):
        for k in range(length):
            M[2 * j + k, j] = low[k]
            M[2 * j + k, larger // 2 + j] = high[k]
    return M[length - 2 : length - 2 + size], (larger - size) // 2


def weight(family: str | None) -> Any:
    @on_matrix
    def waveft(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
        out, inp = W.shape[-2:]
        places = torch.randperm(out * inp, generator=torch.Generator().manual_seed(SEED))[:COUNT]
        if family is None:
            L, R, first, second = torch.eye(out).double(), torch.eye(inp).double(), 0, 0
        else:
            (L, first), (R, second) = synthesis(family, out), synthesis(family, inp)
        rows, columns = places // inp + first, places % inp + second
        if family is not None:  # the quarters of details of rows and of columns change places
            low_row, low_column = rows < L.shape[1] // 2, columns < R.shape[1] // 2
            half = L.shape[1] // 2, R.shape[1] // 2
            right, below = low_row & ~low_column, ~low_row & low_column
            rows, columns = (
                torch.where(right, rows + half[0], torch.where(below, rows - half[0], rows)),
                torch.where(right, columns - half[1], torch.where(below, columns + half[1], columns)),
            )
        waves = torch.einsum("on,in->noi", L[:, rows], R[:, columns])
        return W + SCALING * torch.einsum("...n,noi->...oi", t["waveft_spectrum"], waves)

    return waveft


def row(family: str | None, few: bool = False, **more: Any) -> Row:
    fields = {"n_frequency": COUNT, "scaling": SCALING, "random_loc_seed": SEED, **more}
    return Row(WaveFTConfig, fields, weight(family), prefix="waveft_", few=few)


ROWS = {
    "waveft": row("db1", few=True),
    "waveft-db2": row("db2", wavelet_family="db2"),
    "waveft-sparse": row(None, use_idwt=False),
}
