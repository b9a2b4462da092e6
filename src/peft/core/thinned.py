"""A family of methods whose training drops parts of what they add to W."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .method import Delta

if TYPE_CHECKING:
    from .stack import Adapter


class Thinned(Delta):
    """A delta of which training drops rows (`rank_dropout`) or the whole of it (`module_dropout`) by chance.

    An adapter holds both rates as plain values, and `rank_dropout_scale`: whether the rows that are left make up for
    the others.
    """

    def thins(self, p: Adapter) -> bool:
        """Whether this forward drops anything."""
        return p.layer.training and bool(p.rank_dropout or p.module_dropout)

    def live_delta(self, p: Adapter, W: Tensor) -> Tensor:
        D = self.delta(p, W)
        if not self.thins(p):
            return D
        if p.rank_dropout:
            left = (torch.rand(D.shape[:-1], dtype=torch.float32, device=D.device) > p.rank_dropout).to(D.dtype)
            if p.rank_dropout_scale:
                left = left / left.mean(-1, keepdim=True).clamp_min(1 / left.shape[-1])  # all dropped: 0, not 0 / 0
            D = D * left[..., None]
        if p.module_dropout:
            D = D * (torch.rand((), dtype=torch.float32, device=D.device) > p.module_dropout)
        return D
