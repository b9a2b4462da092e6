"""The forms that GLoRA's tensors take, under the names that checkpoints have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core.draw import kaiming


class GloraPath(nn.Module):
    """Holds one of A to E under the names that checkpoints have."""

    def value(self, rows: slice = slice(None)) -> Tensor | None:
        """What it stands for, or these rows of it; None for zero."""
        return None

    def start(self, at_base: bool) -> None:
        """First values: of the base model, or random ones."""


class GloraLoraPath(GloraPath):
    """Xd Xu."""

    def __init__(self, r: int, *shape: int, **kwargs: Any):
        super().__init__()
        *lead, out, inp = shape
        self.Xd = nn.Parameter(torch.empty(*lead, out, r, **kwargs))
        self.Xu = nn.Parameter(torch.empty(*lead, r, inp, **kwargs))

    def value(self, rows: slice = slice(None)) -> Tensor:
        return self.Xd[..., rows, :] @ self.Xu

    def start(self, at_base: bool) -> None:
        kaiming(self.Xu)
        self.Xd.zero_() if at_base else kaiming(self.Xd)


class GloraVectorPath(GloraPath):
    """A number per row: a column, or (n,)."""

    def __init__(self, *shape: int, **kwargs: Any):
        super().__init__()
        self.X = nn.Parameter(torch.empty(shape, **kwargs))

    def value(self, rows: slice = slice(None)) -> Tensor:
        return self.X[..., rows, :] if self.X.dim() > 1 else self.X

    def start(self, at_base: bool) -> None:
        bound = 1 / math.sqrt(self.X.shape[-1])
        self.X.zero_() if at_base else self.X.uniform_(-bound, bound)


class GloraScalarPath(GloraVectorPath):
    """One number."""

    def start(self, at_base: bool) -> None:
        self.X.zero_() if at_base else self.X.normal_(0, 0.02)


class GloraEmptyPath(GloraPath):
    """Zero, which files hold in full."""

    def __init__(self, *shape: int, **kwargs: Any):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(shape, **kwargs))


def path(r: int, form: str, shape: list[int], lead: int, **kwargs: Any) -> GloraPath:
    """Holder of a tensor in its form; of `lead` leading axes, which stack matrices."""
    if form == "lora":
        return GloraLoraPath(r, *shape, **kwargs)
    if form == "vector":
        return GloraVectorPath(*shape[: lead + 1], *(1 for _ in shape[lead + 1 :]), **kwargs)
    return GloraScalarPath(1, **kwargs) if form == "constant" else GloraEmptyPath(*shape, **kwargs)
