"""How TinyLoRA counts its layers: the vector that each has, and its random matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.shared import seeded_on


class Places:
    """Numbers the layers in their order, and shares them out to the vectors."""

    def __init__(self, count: int, tying: float):
        self.groups = max(1, round(count * (1 - tying)))
        self.size, self.of = max(1, count // self.groups), {}  # type: tuple[int, dict[str, int]]

    def number(self, path: str) -> int:
        """The number of a layer, the next one where it is new."""
        return self.of.setdefault(path, len(self.of))

    def vector(self, path: str) -> str:
        """The name of its vector."""
        return f"tinylora_v.{min(self.number(path) // self.size, self.groups - 1)}"


def projection(settings: Any, number: int, r: int) -> Tensor:
    """P of the layer of this number, (u, r, r)."""
    generator = torch.Generator().manual_seed(settings.projection_seed + number)
    empty = torch.empty(settings.u, r, r, dtype=torch.float32, device=seeded_on())
    return empty.normal_(0, r**-0.5, generator=generator)
