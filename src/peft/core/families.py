"""Families whose members do not add to W: scaling and rotating one of its two sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

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

    def bias(self, p: Adapter, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.on_input(p) else (b * self.scale(p)).to(b.dtype)

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        if not self.on_input(p):
            y = inner(x)
            return (y * inner.spread(self.scale(p))).to(y.dtype)
        scaled = inner.view.scale_input(inner.base, x, self.scale(p))
        return super().forward(p, inner, x) if scaled is None else inner(scaled.to(x.dtype))


class Rotation(Method):
    """W' = W R' and b' = b with an orthogonal R, so that the layer sees x R; on the side of the output W' = R' W.

    `R'` is R transposed. The output side is for layers whose in-features cannot be mixed, such as the tokens of an
    embedding; there the output y becomes y R.
    """

    def rotate(self, p: Adapter, t: Tensor, back: bool = False) -> Tensor:
        """t R on the last axis of t, in R's dtype; t R' if `back`."""
        raise NotImplementedError

    def on_output(self, p: Adapter) -> bool:
        """Whether the out-features are rotated."""
        return p.layer.view.infix != ""

    def refuse_merge(self, p: Adapter) -> None:
        if self.on_output(p) and p.layer.view.bias(p.layer.get_base_layer()) is not None:
            raise NotImplementedError(f"The rotated output of {p.path!r} holds a bias, which cannot be merged.")

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        if self.on_output(p):
            return self.rotate(p, W.mT).mT[..., rows, :].to(W.dtype)
        return self.rotate(p, W, back=True).to(W.dtype)

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        if self.on_output(p):
            y = inner(x)
            return self.rotate(p, y).to(y.dtype)
        return inner(self.rotate(p, x).to(x.dtype)) if inner.view.dense else super().forward(p, inner, x)
