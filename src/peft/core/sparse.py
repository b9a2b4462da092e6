"""The family whose update is learnt at fixed places of a matrix, seen through transforms of features or as it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import sparse
from ..kernels.modes import WIDE, lasting, ordinary
from ..kernels.whole import touched
from .direct import open_linear
from .method import Delta
from .terms import SMALL

if TYPE_CHECKING:
    from .stack import Adapter, Stack

SHARE = (25, 4)  # places for each number, from which on a sparse product is quicker: without transforms, with them


class Sparse(Delta):
    """W' = W + T S U', S with numbers at places that stay; T and U act on features, and are one where not stated.

    Its shortcut acts on activations, on a CPU: x U, the sparse product, T.
    """

    numbers_key: ClassVar[str]  # the tensor of numbers
    places_key: ClassVar[str]  # the derived tensor that their places follow from
    whole_from: ClassVar[tuple[tuple[float, int], tuple[float, int]]] = ((math.inf, 0), (math.inf, 0))
    """From how many numbers of input and output on one W' costs less than transforms of both: so many for each number
    of W, and so many less; without gradients, and with them."""

    def numbers(self, p: Adapter) -> Tensor:
        """The numbers of S, (n), in the dtype of the computation."""
        return p.held(self.numbers_key)

    def placed(self, p: Adapter, held: Tensor, shape: tuple[int, int]) -> sparse.Places | None:
        """Where they stand in S, for a W of this shape; None where `places_key` holds just that."""
        return None

    def taken(self, p: Adapter, x: Tensor) -> Tensor:
        """U' x, (d, N), of x (N, I)."""
        return x.mT

    def given(self, p: Adapter, t: Tensor, out: int) -> Tensor:
        """T t, (N, O), of t (k, N)."""
        return t.mT

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held = open_linear(inner, x) if x.is_cpu and type(self).onto is Delta.onto and x.numel() else None
        if held is None or torch.compiler.is_compiling():
            return super().at_once(p, inner, x)
        W, b = held
        values, at = self.numbers(p), p.held_buffer(self.places_key)
        found, shape = p.cache.get("places"), (W.shape[0], W.shape[1])
        if found is None or not found.of(at):
            with ordinary():
                found = self.placed(p, at, shape) or sparse.places(p.cache, at, shape)
            if lasting():
                p.cache["places"] = found
        alike, itself = values.dtype is x.dtype, type(self).taken is Sparse.taken
        flat, form = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], shape[0])
        if itself and alike and flat.shape[0] == 1 and not torch.is_grad_enabled():
            return sparse.row(F.linear(flat, W, b), flat, values, found).view(form)
        many, fewer = self.whole_from[torch.is_grad_enabled()]
        whole = (alike or W.numel() <= SMALL) and touched(x, W) > many * W.numel() - fewer
        if whole or values.shape[0] * SHARE[not itself] > W.numel():
            dense = itself and alike and x.dtype in WIDE
            return F.linear(x, sparse.scattered(W, values, found), b) if dense else super().at_once(p, inner, x)
        if itself and alike and found.gains is None and type(self).given is Sparse.given:
            return sparse.linear(flat, W, b, values, found).view(form)
        values = values if found.gains is None else (values * found.gains).flatten()
        u = self.given(p, sparse.product(values, self.taken(p, flat.to(values.dtype)), found), shape[0])
        if alike:
            return torch.addmm(u if b is None else u + b, flat, W.mT).view(form)
        return (F.linear(flat, W, b) + u).to(x.dtype).view(form)
