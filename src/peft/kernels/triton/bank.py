"""A bank of adapters of all ranks, without padding, for the mixed batches of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .segments import Segments, segments
from .update import How, mixed, place, plain

Terms = Sequence[tuple[str, tuple[Tensor, Tensor, Any]]]


class Ragged:
    """The factors of some adapters below one another: A (R, d), and B (R, k) with the scaling in it.

    Arguments:
        terms: (name, (A (r, d), B (k, r), scaling)) of each, of one dtype and device.
        allowed: tells of tensors whether the kernels may be used on them now.
    """

    def __init__(self, terms: Terms, allowed: Any):
        self.names = tuple(name for name, _ in terms)
        self.allowed = allowed
        ranks = [A.shape[0] for _, (A, _, _) in terms]
        starts = [sum(ranks[:i]) for i in range(len(ranks) + 1)]
        self.rank = max(ranks)
        self.A = torch.cat([A for _, (A, _, _) in terms])
        self.B = torch.cat([B.mT if type(s) is float and s == 1.0 else B.mT * s for _, (_, B, s) in terms])
        self.starts = torch.tensor(starts, dtype=torch.int32, device=self.A.device)

    def add(self, y: Tensor, x: Tensor, groups: Any, own: bool) -> Tensor:
        """y and the update of each row of x (rows, ..., d) by its adapter; in y itself if that is nobody else's.

        Arguments:
            y: (rows, ..., k).
            x: the rows.
            groups: adapter -> its rows, as `core.banks` has it.
            own: whether y may be written.
        """
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        how = How(1.0, self.rank, at=self.segments(groups, len(flat_x)), starts=self.starts)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, self.A, self.B))
        if not self.allowed(flat_x, flat_y, self.A, self.B) or (learns and not self.A.requires_grad):
            return plain(flat_y, flat_x, self.A, self.B, how).view(y.shape)
        if learns:
            return mixed(flat_y, flat_x, self.A, self.B, how).view(y.shape)
        return place(flat_y if own else flat_y.clone(), flat_x, self.A, self.B, how).view(y.shape)

    def segments(self, groups: Any, count: int) -> Segments:
        """The tables of a batch, made once for all layers whose banks have the same order."""
        positions = count // groups.total if groups.total else 0
        key = (self.names, positions)
        if key not in groups.tables:
            rows: Mapping[str, list[int]] = groups.lists
            here = [(slot, rows[n]) for slot, n in enumerate(self.names) if n in rows]
            groups.tables[key] = segments(here, len(self.names), positions, self.A.device)
        found: Segments = groups.tables[key]
        return found
