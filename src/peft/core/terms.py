"""Updates that are a sum of low-rank terms: each acts on activations, so that no factors are put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import lowrank, onto, slim
from ..kernels.modes import WIDE, transformed
from ..kernels.projected import Held, Parts, beside, projected
from ..kernels.whole import touched
from .direct import open_linear
from .method import LowRank

if TYPE_CHECKING:
    from .stack import Adapter, Stack

SMALL = 2**13  # numbers in a weight, which one product with the whole of costs least for any number of rows
Term = tuple[Tensor, Tensor, Any]  # (A, B, g): B g A for a matrix g, B diag(g) A, or g B A for a number g


def summed(inner: Stack, x: Tensor, terms: Sequence[Term]) -> Tensor | None:
    """W x + b + the sum of the terms, over a plain linear layer; None elsewhere.

    In training, factors of another dtype than the layer's are left to a node that keeps x as it is.
    """
    held = open_linear(inner, x)
    alike = all(A.dtype is x.dtype is B.dtype for A, B, _ in terms)
    if held is None:
        return None
    W, b = held
    wide = 2 * sum(A.shape[0] for A, *_ in terms) >= min(W.shape)  # else thin products cost less for any number of rows
    few = torch.compiler.is_compiling() or len(terms) == 1 or not (wide and x.is_cpu)  # a graph is for any rows
    if not few and (W.numel() <= SMALL or touched(x, W) > W.numel()):
        if alike and x.dtype in WIDE:
            return F.linear(x, W + _update(terms), b)
        if x.dtype is torch.bfloat16:
            return F.linear(x, W, b) + F.linear(x, _update(terms).to(x.dtype))
    return over(x, W, b, terms) if alike or not torch.is_grad_enabled() else None


class Between(LowRank):
    """W' = W + B M A, of which M alone is learnt."""

    keeps_factors = True

    def middle(self, p: Adapter) -> tuple[Tensor, Tensor, Tensor]:
        """(A, M, B)."""
        raise NotImplementedError

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        A, M, B = self.middle(p)
        return (M @ A.to(M.dtype)).to(A.dtype), B

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        """In training M acts on what is between A and B, so that neither needs a gradient."""
        held = open_linear(inner, x) if torch.is_grad_enabled() and not self.drop_rate(p) else None
        if held is not None and type(self).onto is LowRank.onto:
            A, M, B = self.middle(p)
            if A.dtype is M.dtype is B.dtype and M.dim() == 2:
                return over(x, *held, [(A, B, M)])
        return super().at_once(p, inner, x)


class Moved(LowRank):
    """W' = W + B diag(g) A - B0 diag(g0) A0: three factors that are learnt, without what they were first.

    The gradients of A and B stay within subspaces.
    """

    def moved(self, p: Adapter) -> tuple[Parts, Parts, tuple[Held, Held]]:
        """(A, B, g), as they were first, and what A's rows and B's columns may move in."""
        raise NotImplementedError

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        """In training, few rows are projected in place of the gradients that they give."""
        if type(self).onto is not LowRank.onto:
            return super().at_once(p, inner, x)
        held = open_linear(inner, x) if torch.is_grad_enabled() and not transformed() else None
        new, old, bases = self.moved(p)
        few = held is not None and x.numel() < new[2].numel() * x.shape[-1]
        y = None if few else summed(inner, x, self.terms(p))
        if held is not None and y is None:
            return beside(x, *held, new, old, bases)
        return super().at_once(p, inner, x) if y is None else y

    def terms(self, p: Adapter) -> tuple[Term, Term]:
        """B diag(g) A and - B0 diag(g0) A0."""
        (A, B, g), (A0, B0, g0), (right, left) = self.moved(p)
        return (projected(A.mT, *right).mT, projected(B, *left), g), (A0, B0, -g0)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        (A, B, g), (A0, B0, g0) = self.terms(p)
        return torch.cat((A, A0), -2), torch.cat((B * g[..., None, :], B0 * g0[..., None, :]), -1)

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        A, B = self.factors(p)
        r = A.shape[-2] // 2
        return B[..., rows, :r] @ A[..., :r, :] + B[..., rows, r:] @ A[..., r:, :]


def _update(terms: Sequence[Term]) -> Tensor:
    """The sum of the terms by itself: what cancels in it does so before W is added."""
    (A, B, g), *rest = terms
    D = (B * g) @ A
    for A, B, g in rest:
        D = torch.addmm(D, B * g, A)
    return D


def over(x: Tensor, W: Tensor, b: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """The same where that is known."""
    if len(terms) == 1 and type(terms[0][2]) is float:
        return lowrank.linear(x, W, b, *terms[0])
    flat, made = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])), []
    for A, B, gain in terms:
        h = flat if flat.dtype is A.dtype else flat.to(A.dtype)
        h = F.linear(h, A) if torch.compiler.is_compiling() else slim.down(h, A)
        if isinstance(gain, Tensor) and gain.dim():
            h, gain = (h * gain if gain.dim() == 1 else F.linear(h, gain)), 1.0
        made.append((h, B.mT, gain))
    return onto.thin(x, W, b, *made)
