"""The family whose update is learnt at fixed places of a matrix, seen through transforms of features or as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import sparse
from .direct import open_linear
from .method import Delta

if TYPE_CHECKING:
    from .stack import Adapter, Stack

SHARE = 10  # of all places, up to which the numbers are fewer than a dense product is worth


class Sparse(Delta):
    """W' = W + T S U', S with numbers at places that stay; T and U act on features, and are one where not stated.

    Its shortcut acts on activations, on a CPU: x U, the sparse product, T.
    """

    numbers_key: ClassVar[str]  # the tensor of numbers
    places_key: ClassVar[str]  # the derived tensor that their places follow from

    def numbers(self, p: Adapter) -> Tensor:
        """The numbers of S, (n), in the dtype of the computation."""
        return p.held(self.numbers_key)

    def placed(self, p: Adapter, held: Tensor, shape: tuple[int, int]) -> sparse.Places:
        """Where they stand in S, for a W of this shape; what is held are rows and columns, (2, n), or both in one."""
        rows, columns = held.long() if held.dim() == 2 else (held.long() // shape[1], held.long() % shape[1])
        return sparse.Places(held, rows, columns, shape)

    def taken(self, p: Adapter, x: Tensor) -> Tensor:
        """U' x, (d, N), of x (N, I)."""
        return x.mT

    def given(self, p: Adapter, t: Tensor, out: int) -> Tensor:
        """T t, (N, O), of t (k, N)."""
        return t.mT.contiguous()

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held = open_linear(inner, x) if x.is_cpu and type(self).onto is Delta.onto and x.numel() else None
        if held is None or torch.compiler.is_compiling():
            return super().at_once(p, inner, x)
        W, b = held
        values, at = self.numbers(p), p.held_buffer(self.places_key)
        if len(values) * SHARE > W.numel():
            return super().at_once(p, inner, x)
        found = p.cache.get("places")
        if found is None or not found.of(at):
            p.cache["places"] = found = self.placed(p, at, (W.shape[0], W.shape[1]))
        values = values if found.gains is None else (values * found.gains).flatten()
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, W, b)
        u = self.given(p, sparse.product(values, self.taken(p, flat.to(values.dtype)), found), len(W))
        return (y.add_(u) if u.dtype is y.dtype else (y + u).to(y.dtype)).view(*x.shape[:-1], len(W))
