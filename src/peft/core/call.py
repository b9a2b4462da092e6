"""What one forward carries to every tuner layer of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

BASE = "__base__"


class Call:
    """The per-call record, one object shared by all tuner layers of a model.

    Attributes:
        names: one adapter name per sample of the batch, or None for the active adapters.
        beams: how often each sample may be repeated (beam search).
        length: tokens per sample, where known; rows of flattened tokens are then told apart.
        only: while a module runs on the rows of one adapter, that adapter's name.
        offsets: adapter -> on how many of each row's last positions it acts, (rows,); None where nobody has looked.
        given_offsets: what the caller says of that, one number or None per sample.
        watched: whether somebody finds offsets before each forward.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] | None = None
        self.beams = 1
        self.length: int | None = None
        self.only: str | None = None
        self.offsets: dict[str, Tensor] | None = None
        self.given_offsets: list[int | None] | None = None
        self.watched = False
        self._groups: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    @contextmanager
    def mixed(self, names: Sequence[str] | None, beams: int = 1, length: int | None = None) -> Iterator[None]:
        """Route each sample to its own adapter while the context is open; restores the previous call on exit."""
        before = (self.names, self.beams, self.length)
        self.names, self.beams, self.length = (tuple(names) if names is not None else None), beams, length
        self._groups = {}
        try:
            yield
        finally:
            self.names, self.beams, self.length = before
            self._groups = {}

    @contextmanager
    def given(self, offsets: Sequence[int | None]) -> Iterator[None]:
        """While open, these are the offsets of the samples."""
        before, self.given_offsets = self.given_offsets, list(offsets)
        try:
            yield
        finally:
            self.given_offsets = before

    def groups(self, rows: int, device: torch.device, where: str, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Row indices of each adapter, (rows of that adapter,) int64, for an input of `rows` rows.

        Raises ValueError if the rows cannot be assigned to the names without guessing.
        """
        if ".experts." in f".{where}" and re.search(r"\bexperts\.\d+\b", where):
            raise self._unclear(rows, len(names), where)  # it gets some tokens of some samples, whatever their number
        key = (rows, device)
        known = self._groups.get(key) if names is self.names else None
        if known is not None:
            return known
        repeat = self._repeat(rows, len(names), where)
        found = {
            name: torch.tensor(
                [i * repeat + k for i, n in enumerate(names) if n == name for k in range(repeat)],
                device=device,
            )
            for name in dict.fromkeys(names)
        }
        if names is self.names:
            self._groups[key] = found
        return found

    def _repeat(self, rows: int, samples: int, where: str) -> int:
        allowed = {1, self.beams, self.length}
        if samples and rows % samples == 0 and rows // samples in allowed:
            return rows // samples
        raise self._unclear(rows, samples, where)

    def _unclear(self, rows: int, samples: int, where: str) -> ValueError:
        return ValueError(
            f"adapter_names has {samples} entries, but the layer {where!r} received {rows} rows, so its rows cannot be "
            "assigned to adapters. Pass one name per sample; layers that regroup samples cannot take a mixed batch."
        )
