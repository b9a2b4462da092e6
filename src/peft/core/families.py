"""The family that scales the features which a layer gives or takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .folding import Fold, Scaled
from .method import Method

if TYPE_CHECKING:
    from .stack import Adapter, Stack


class Scaling(Method):
    """W' = diag(l) W and b' = l b; on the side of the input W' = W diag(l) and b' = b."""

    def scale(self, p: Adapter) -> Tensor:
        """l, (..., O), or (..., I) on the side of the input."""
        raise NotImplementedError

    def on_input(self, p: Adapter) -> bool:
        """Whether the in-features are scaled."""
        return False

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        scale = self.scale(p)
        if not self.on_input(p):
            return (W * scale[..., rows, None]).to(W.dtype)
        factor = p.layer.view.per_input(p.layer.get_base_layer(), scale)
        return (W * (factor if factor.shape[-2] == 1 else factor[..., rows, :])).to(W.dtype)

    def fold(self, p: Adapter, wide: torch.dtype, original: bool) -> Fold | None:
        if type(self).weight is not Scaling.weight:
            return None
        scale = self.scale(p).to(wide)
        if not self.on_input(p):
            return Scaled(scale[:, None])
        factor = p.layer.view.per_input(p.layer.get_base_layer(), scale)
        return Scaled(factor) if factor.shape[0] == 1 else None

    def bias(self, p: Adapter, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.on_input(p) else (b * self.scale(p)).to(b.dtype)

    def keeps(self, p: Adapter) -> bool:
        return self.on_input(p) and not p.layer.view.dense

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        if not self.on_input(p):
            y = inner(x)
            return (y * inner.spread(self.scale(p))).to(y.dtype)
        scaled = inner.view.scale_input(inner.base, x, self.scale(p))
        return super().forward(p, inner, x) if scaled is None else inner(scaled.to(x.dtype))
