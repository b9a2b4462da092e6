"""What turns rows of W into those of W' in their own place, as a merge does it: in few passes over memory."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from .views import LinearView

ALL = slice(None)


class Fold(abc.ABC):
    """One adapter's change of a weight (O, I)."""

    @abc.abstractmethod
    def __call__(self, W: Tensor, V: Tensor, rows: slice) -> Any:
        """Make rows of W' of those of W, (rows, I), in V, which may be W; which they are is told by `rows`."""

    @abc.abstractmethod
    def bound(self, largest: float, width: int) -> float:
        """No number of W' is larger, if none of W, (O, width), is larger than `largest`; NaN or infinite: not known."""


class Product(Fold):
    """V + s B A.

    Arguments:
        A, B: (r, I) and (O, r).
        s: a number, or a tensor of one element.
        wide: the dtype of sums.
    """

    def __init__(self, A: Tensor, B: Tensor, s: Any, wide: torch.dtype):
        self.A, self.B, self.s = A.to(wide), B.to(wide), s
        if isinstance(s, Tensor):
            self.B, self.s = self.B * s, 1

    def __call__(self, W: Tensor, V: Tensor, rows: slice) -> Any:
        B = self.B if rows is ALL else self.B[rows]
        return V.addmm_(B, self.A, alpha=self.s) if W is V else torch.addmm(W, B, self.A, alpha=self.s, out=V)

    def bound(self, largest: float, width: int) -> float:
        if not self.B.numel():
            return largest
        return largest + abs(self.s) * float(self.B.abs().sum(-1).max()) * float(self.A.abs().max())


class Scaled(Fold):
    """V diag(gain), or diag(gain) V.

    Arguments:
        gain: (1, I) or (O, 1), in the dtype of sums.
    """

    def __init__(self, gain: Tensor):
        self.gain = gain

    def __call__(self, W: Tensor, V: Tensor, rows: slice) -> Any:
        return torch.mul(W, self.gain if self.gain.shape[0] == 1 else self.gain[rows], out=V)

    def bound(self, largest: float, width: int) -> float:
        return largest * float(self.gain.abs().max()) if self.gain.numel() else 0.0


class Direction(Fold):
    """m V / |V| by rows, for V that another fold makes; a row of zeros stays one.

    Arguments:
        of: makes V.
        m: (O,), float32.
    """

    def __init__(self, of: Fold, m: Tensor):
        self.of, self.m = of, m

    def __call__(self, W: Tensor, V: Tensor, rows: slice) -> Any:
        self.of(W, V, rows)
        n = torch.linalg.vector_norm(V, dim=1)
        return V.mul_((self.m[rows] / n.masked_fill_(n == 0, 1))[:, None])

    def bound(self, largest: float, width: int) -> float:
        norm = self.of.bound(largest, width) * width**0.5
        return 2 * float(self.m.abs().max()) if norm < 1e18 else float("inf")  # squares beyond leave float32


def directed(of: Fold | None, view: LinearView, m: Tensor, wide: torch.dtype) -> Fold | None:
    """`Direction` of a fold, where sums have the dtype in which norms are taken and rows of W are what they are of."""
    alike = wide is torch.float32 and type(view).norm_product is LinearView.norm_product
    return Direction(of, m.to(wide)) if of is not None and alike else None
