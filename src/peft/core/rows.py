"""Which rows of a batch are under which adapter, and in what order they are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Rows of a batch by adapter, c of them for each slot of a bank.

    Attributes:
        members: which slots of the bank, in order.
        slots: the same as a tensor, (S,); None for all.
        rows: (S c,) of the batch; an adapter that has fewer repeats its first one. None: the batch is in this order.
        real: which of these are no repetition; None for all.
        to: the rows that these stand for.
    """

    members: tuple[int, ...]
    slots: Tensor | None
    rows: Tensor | None
    real: Tensor | None
    to: Tensor

    @property
    def adapters(self) -> int:
        """S."""
        return len(self.members)


class Groups(Mapping[str, Tensor]):
    """Row indices of each adapter of a batch, (rows of that adapter,) int64, made when they are asked for.

    Arguments:
        rows: adapter -> its rows.
        total: rows of the batch.
        device: of the indices.
    """

    def __init__(self, rows: Mapping[str, list[int]], total: int, device: torch.device):
        self.lists, self.total, self.device, self.names = rows, total, device, tuple(rows)
        self.on_cpu = device.type == "cpu"
        self._made: dict[str, Tensor] = {}
        self._known: dict[tuple[str, ...], list[Segments]] = {}
        self.tables: dict[Any, Any] = {}  # what other kernels read

    def __contains__(self, name: object) -> bool:
        return name in self.lists

    def __iter__(self) -> Iterator[str]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, name: str) -> Tensor:
        found = self._made.get(name)
        if found is None:
            found = self._made[name] = torch.tensor(self.lists[name], device=self.device)
        return found

    def columns(self, order: tuple[str, ...], width: int, kind: torch.dtype) -> Tensor:
        """Which columns are a row's own where adapters in this order have `width` each: (total, columns) of integers.

        All bits of those are set, and none of the others.
        """
        key = (order, width, kind)
        found: Tensor | None = self.tables.get(key)
        if found is None:
            bits = torch.zeros(self.total, len(order), width, dtype=kind, device=self.device)
            for slot, name in enumerate(order):
                bits[self[name], slot] = -1
            found = self.tables[key] = bits.flatten(1)
        return found

    def segments(self, order: tuple[str, ...]) -> list[Segments]:
        """The rows of the adapters that are in a bank's slots in this order; few, so that little is padding."""
        known = self._known.get(order)
        if known is None:
            here = [(slot, self.lists[n]) for slot, n in enumerate(order) if n in self.lists]
            largest, total = max((len(rows) for _, rows in here), default=0), sum(len(rows) for _, rows in here)
            tiers: dict[int, list[tuple[int, list[int]]]] = {}
            for slot, rows in here:
                alike = 0 if largest * len(here) <= 2 * total else (len(rows) - 1).bit_length()
                tiers.setdefault(alike, []).append((slot, rows))
            known = self._known[order] = [self._padded(tier, len(order)) for tier in tiers.values()]
        return known

    def _padded(self, tier: list[tuple[int, list[int]]], slots: int) -> Segments:
        size = max(len(rows) for _, rows in tier)
        padded = [i for _, rows in tier for i in rows + rows[:1] * (size - len(rows))]
        real = [j * size + i for j, (_, rows) in enumerate(tier) for i in range(len(rows))]
        to = [i for _, rows in tier for i in rows]
        members = tuple(slot for slot, _ in tier)

        def tensor(numbers: Any) -> Tensor:
            return torch.tensor(numbers, device=self.device)

        return Segments(
            members,
            None if len(tier) == slots else tensor(members),
            None if padded == list(range(self.total)) else tensor(padded),
            None if len(real) == len(padded) else tensor(real),
            tensor(to),
        )
