"""Whose rows are where: the tables that the kernels read, made once for a batch and used by every layer.

The tokens of a batch are numbered in the order of their adapters: `rows[j]` is the row of the batch that stands j-th,
and a row has T tokens. A bank's factors stand below one another without padding, A (R, d) and B (R, k) with R the sum
of all ranks; slot s has the rows starts[s] to starts[s + 1]. After Chen et al. 2023 (Punica), arXiv 2310.18547, and
Sheng et al. 2023 (S-LoRA), arXiv 2311.03285.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 16  # tokens that one program works on, all of one slot


class Segments(NamedTuple):
    """Tokens by slot.

    Attributes:
        rows: (rows of the batch,) int64, the rows of the batch by adapter.
        tiles: (P, 3) int32: slot, first token and the one after the last, for at most TILE tokens; of slot -1 nothing
            is computed, so that a table of fixed size can hold fewer.
        spans: (S, 3) int32: the same for all tokens of each slot, a slot without tokens among them.
        positions: T, tokens of a row.
        tokens: in all.
    """

    rows: Tensor
    tiles: Tensor
    spans: Tensor
    positions: int
    tokens: int


def segments(rows: Sequence[tuple[int, Sequence[int]]], slots: int, positions: int, device: torch.device) -> Segments:
    """The tables of a batch.

    Arguments:
        rows: (slot, its rows of the batch) of those that are in the batch; slot -1 for rows without an adapter.
        slots: S, of the bank.
        positions: T.
        device: of the tables.
    """
    spans = [[slot, 0, 0] for slot in range(slots)]
    tiles: list[list[int]] = []
    index: list[int] = []
    at = 0
    for slot, mine in rows:
        index += mine
        end = at + len(mine) * positions
        tiles += [[slot, first, min(first + TILE, end)] for first in range(at, end, TILE)]
        if slot >= 0:
            spans[slot] = [slot, at, end]
        at = end
    return Segments(
        torch.tensor(index, dtype=torch.int64, device=device),
        torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, 3),
        torch.tensor(spans, dtype=torch.int32, device=device).view(-1, 3),
        positions,
        at,
    )
