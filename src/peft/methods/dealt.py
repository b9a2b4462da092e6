"""Places of one short vector, dealt out to all layers of a model as evenly as can be, by numpy's generator."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from ..core.shared import is_late


class Deal:
    """The places of all layers, given out in their order; they are dealt when the first is looked at."""

    def __init__(self, count: int, length: int, seed: int):
        self.form = (self.count, self.length, self.seed) = (count, length, seed)
        self.next = self.given = 0
        self.waits = is_late()

    @cached_property
    def places(self) -> Tensor:
        """All of them."""
        import numpy as np

        rng = np.random.default_rng(self.seed)
        times, rest = divmod(self.count, self.length)
        places = np.repeat(np.arange(self.length), times)
        if rest:
            places = np.concatenate([places, rng.choice(self.length, size=rest, replace=False)])
        rng.shuffle(places)
        return torch.from_numpy(places)

    @cached_property
    def factor(self) -> Tensor:
        """c."""
        times = self.places.new_zeros(self.length).scatter_add_(0, self.places, torch.ones_like(self.places))
        return times.clamp_min(1).float().rsqrt()

    def book(self, shape: tuple[int, ...]) -> int:
        """Where the next places, in this shape, begin."""
        self.next += math.prod(shape)
        return self.next - math.prod(shape)

    def at(self, start: int, shape: tuple[int, ...]) -> Tensor:
        """The places that begin there."""
        n = math.prod(shape)
        found = self.places[start : start + n].view(shape).clone()
        self.given += n
        if self.given >= self.count:
            del self.places  # and the memory is free
        return found
