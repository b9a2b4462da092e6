"""The family that turns the in-features of a weight, and what its members share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import blocks as kernel
from .memory import aligned
from .method import Method

if TYPE_CHECKING:
    from .stack import Adapter, Stack


class Rotation(Method):
    """W' = W R' and b' = b, R' being R transposed, so that the layer sees x R; R is orthogonal, as a rule.

    Where the in-features cannot be mixed (tokens of an embedding) the out-features are: W' = R' W, the output is y R.
    """

    def rotate(self, p: Adapter, t: Tensor, back: bool = False, drop: bool = False) -> Tensor:
        """t R on the last axis of t, in R's dtype; t R' if `back`, with the dropout of training if `drop`.

        A weight comes as (..., rows, I), with its groups as the first axis where R differs between them.
        """
        raise NotImplementedError

    def on_output(self, p: Adapter) -> bool:
        """Whether the out-features are rotated."""
        return p.layer.view.infix != ""

    def rowwise(self, p: Adapter) -> bool:
        return not self.on_output(p) and p.layer.view.groups(p.layer.get_base_layer()) == 1

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        return self._turned(p, aligned(W), drop=False)

    def live_weight(self, p: Adapter, W: Tensor) -> Tensor:
        return self._turned(p, W, drop=bool(p.layer.training))

    def _turned(self, p: Adapter, W: Tensor, drop: bool) -> Tensor:
        if self.on_output(p):
            return self.rotate(p, W.mT, drop=drop).mT.to(W.dtype)
        groups = p.layer.view.groups(p.layer.get_base_layer())
        if groups == 1:
            return self.rotate(p, W, back=True, drop=drop).to(W.dtype)
        return self.rotate(p, W.unflatten(-2, (groups, -1)), back=True, drop=drop).flatten(-3, -2).to(W.dtype)

    def keeps(self, p: Adapter) -> bool:
        return not self.on_output(p) and not p.layer.view.dense

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        drop = bool(p.layer.training)
        if self.on_output(p):
            y = inner(x)
            return self.rotate(p, y, drop=drop).to(y.dtype)
        if inner.view.dense:
            found = self.at_once(p, x)
            return inner(self.rotate(p, x, drop=drop).to(x.dtype) if found is None else found)
        return super().forward(p, inner, x)

    def at_once(self, p: Adapter, x: Tensor) -> Tensor | None:
        """`rotate` of a dense layer's input in fewer operations; None where there is no such way."""
        return None


def blockwise(t: Tensor, blocks: Tensor) -> Tensor:
    """t times a block-diagonal matrix, on the last axis of t.

    Arguments:
        t: (..., n b), or with the same leading axes as the blocks, (*lead, rows, n b).
        blocks: (*lead, n, b, b).
    """
    return kernel.times(t.to(blocks.dtype), blocks)


def without(blocks: Tensor, dropped: Tensor) -> Tensor:
    """The blocks with those marked replaced by the identity; (..., n, b, b) and (..., n)."""
    return torch.where(dropped[..., None, None], kernel.one(blocks), blocks)


def within(held: Tensor, limit: float, store: bool) -> Tensor:
    """The numbers of each block cut to |Q| <= limit; the gradient takes no notice. Training stores what was cut."""
    size = math.sqrt(2) * torch.linalg.vector_norm(held.detach(), dim=-1, keepdim=True)
    cut = torch.where(size > limit, held.detach() * (limit / size), held.detach())
    if store:
        held.data.copy_(cut)
    return cut + (held - held.detach())
