"""Matrices of low rank: products B A, their truncated decompositions, and how layers hold them.

A product is never written out to be decomposed: with B = Q R and A' = P S, the singular values of B A are those of the
small R S' (r x r), which costs (O + I) r^2 where the dense decomposition costs O I min(O, I).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.draw import triplets
from ..kernels.modes import has_double, single

SMALL = 64  # products with a side of at most this length are multiplied out: as fast, and signs are those of others
EXACT_SIZE = 1024  # matrices whose smaller side is longer are decomposed by random projections where a rank is given
OVERSAMPLING, POWERS = 16, 4
ROUNDING = 1e-13  # of a squared norm: single precision


class Pair(NamedTuple):
    """A (..., r, I) and B (..., O, r) of a product B A."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[-2]

    def product(self) -> Tensor:
        """B A, (..., O, I)."""
        return self.B @ self.A

    def scaled(self, scale: float) -> Pair:
        """The pair of the product times a number, in single precision or better."""
        A, B = (single(t) for t in self)
        return Pair(A * scale, B)

    def padded(self, r: int) -> Pair:
        """The same product with rank r; r is not smaller than the rank."""
        missing = r - self.rank
        return self if missing <= 0 else Pair(F.pad(self.A, (0, 0, 0, missing)), F.pad(self.B, (0, missing)))


class Cut(NamedTuple):
    """A truncated decomposition and its error: the norm of what is left out over that of the whole."""

    pair: Pair
    error: float


def joined(pairs: list[Pair]) -> Pair:
    """The pair of the sum of some products, exactly."""
    return Pair(torch.cat([p.A for p in pairs], -2), torch.cat([p.B for p in pairs], -1))


def exactly(t: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return t.double() if has_double(t.device) else t.float()


class Spectrum:
    """The singular value decomposition of a matrix or a stack of such, U diag(S) Vh, of a product or of a dense one.

    Arguments:
        matrix: the pair, or the dense matrix (..., O, I).
        rank: the largest rank that will be asked for, where that is known: large matrices are then projected.
        driver: of torch.linalg.svd, on CUDA.
        energy: the share of the squared norm that will be asked for, where that is known: large matrices are then
            projected on as many directions as hold it.
    """

    def __init__(
        self,
        matrix: Pair | Tensor,
        rank: int | None = None,
        driver: str | None = None,
        energy: float | None = None,
    ):
        self.complete = True
        if isinstance(matrix, Pair) and min(matrix.B.shape[-2], matrix.A.shape[-1]) <= SMALL:
            matrix = matrix.product()
        if isinstance(matrix, Pair):
            Q, R = torch.linalg.qr(exactly(matrix.B))
            P, T = torch.linalg.qr(exactly(matrix.A).mT)
            U, self.S, Vh = torch.linalg.svd(R @ T.mT, full_matrices=False, driver=driver)
            self.U, self.Vh = Q @ U, Vh @ P.mT
            self.squares = self.S.square().sum(-1)
            return
        smaller = min(matrix.shape[-2:])
        most = smaller // 2 - OVERSAMPLING if smaller > EXACT_SIZE else 0
        sizes = [64 * 2**i for i in range(16)] if rank is None and energy is not None else [rank or smaller]
        for size in (q for q in sizes if q < most):
            self._project(matrix.float(), size)
            if energy is None or rank is not None or not (self.left_out() > (1 - energy) * self.squares).any():
                return
        self.complete = True
        self.U, self.S, self.Vh = torch.linalg.svd(exactly(matrix), full_matrices=False, driver=driver)
        self.squares = self.S.square().sum(-1)

    def _project(self, D: Tensor, rank: int) -> None:
        self.complete = False
        self.U, self.S, self.Vh = triplets(D, rank + OVERSAMPLING, POWERS, seed=0)
        self.squares = exactly(D).square().sum((-2, -1))

    @property
    def square(self) -> Tensor:
        """The squared norm of the whole."""
        return self.squares.sum()

    def left_out(self) -> Tensor:
        """The squared norm that no singular value here stands for, of each matrix; 0 if all are known."""
        if self.complete:
            return torch.zeros_like(self.squares)
        return (self.squares - self.S.to(self.squares).square().sum(-1)).clamp_min(0)

    def rank(self, energy: float = 1.0) -> int:
        """The smallest rank that keeps this share of the squared norm; 1.0: all but rounding. Of a stack: the most.

        A matrix of zeros has rank 0.
        """
        square = exactly(self.S.reshape(-1, self.S.shape[-1])).square()
        rest = square.flip(-1).cumsum(-1).flip(-1)  # what is left out without the k-th value and those after it
        rest = rest + self.left_out().reshape(-1, 1).to(rest)
        whole = rest[:, :1]
        return int((rest > whole * max(1 - energy, ROUNDING)).sum(-1).max())

    def cut(self, r: int, dtype: torch.dtype, balanced: bool = False) -> Cut:
        """The best product of rank r, B = U S and A = Vh, or with the root of S on both sides if `balanced`."""
        k = min(r, self.S.shape[-1])
        S = self.S[..., :k]
        left = self.square - exactly(S).square().sum()
        error = float((left.clamp_min(0) / self.square).sqrt()) if self.square > 0 else 0.0
        right, up = (S.sqrt(), S.sqrt()) if balanced else (torch.ones_like(S), S)
        A, B = right[..., None] * self.Vh[..., :k, :], self.U[..., :k] * up[..., None, :]
        return Cut(Pair(A.to(dtype), B.to(dtype)).padded(r), error if error > 1e-7 else 0.0)
