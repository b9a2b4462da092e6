"""How AdaMSS deals the rows of a weight out to clusters: a decomposition of the weight, and k-means."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...kernels.modes import numbered

SEED, ROUNDS = 123456789, 10  # of k-means, as the peer has them
TURNS = 2  # of the subspace iteration
LARGE = 2**26  # numbers; more are not copied as one


class Deal:
    """[W0 | b0] decomposed: N (r, columns), the left vectors U (rows, r), and the rows of each cluster."""

    def __init__(self, W: Tensor, b: Tensor | None, c: Any, path: str):
        if not numbered(W):
            raise ValueError(
                f"AdaMSS groups rows of {path!r} by their numbers, which the meta device lacks, as do fake tensors. "
                "Load the base model, then add the adapter."
            )
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(c.random_seed)
            self.U, V = leading(W.detach().flatten(0, -2), b, c.r)
        self.N = V.mT.contiguous()
        from ..kmeans import labels  # by numpy, which torch does without

        found = labels(self.U, min(c.num_subspaces, len(self.U)), ROUNDS, SEED)
        self.clusters = [at for k in range(int(found.max()) + 1) if len(at := (found == k).nonzero()[:, 0])]

    def rank(self, at: Tensor, c: Any) -> int:
        """q of a cluster."""
        most = min(len(at), c.subspace_rank, self.U.shape[1])
        if not c.use_dynamic_rank:
            return most
        size = torch.linalg.svdvals(self.U[at.to(self.U.device)]).square()  # those of X X'
        small = int((size <= c.svd_threshold * size[0]).sum())  # none, where a run without numbers counts them
        return max(1, min(most, len(size) - small))

    def places(self) -> Tensor:
        """Where each row stands when the clusters are put one below another."""
        return torch.cat(self.clusters).argsort().to(self.N.device)

    def shadow(self, N: Tensor) -> Tensor:
        """A fixed vector seen through the space of N's rows: the same for every basis of that space."""
        probe = torch.linspace(-1, 1, N.shape[1], dtype=N.dtype, device=N.device).sin_()
        return N.mT @ (N @ probe)


class Unknown(Deal):
    """What is known of the deal of a weight whose numbers are not there: how many clusters, and their largest ranks.

    Arguments:
        W, b: on the meta device.
        c: the configuration.
        count: of clusters; None: as many as can be.
    """

    def __init__(self, W: Tensor, b: Tensor | None, c: Any, count: int | None):
        rows, columns = math.prod(W.shape[:-1]), W.shape[-1] + (b is not None)
        r = min(c.r, rows, columns)
        self.U, self.N = W.new_empty(rows, r), W.new_empty(r, columns)
        self.clusters = list(W.new_empty(rows).tensor_split(count or min(c.num_subspaces, rows)))

    def rank(self, at: Tensor, c: Any) -> int:
        return min(len(at), c.subspace_rank, self.U.shape[1])


def leading(W: Tensor, b: Tensor | None, r: int) -> tuple[Tensor, Tensor]:
    """The leading left and right singular vectors of [W | b], (rows, r) and (columns, r), by subspace iteration."""
    rows, columns = W.shape[0], W.shape[1] + (b is not None)
    q = min(r, rows, columns)
    if rows * columns <= LARGE or (W.dtype is torch.float32 and b is None):  # which needs no copy
        U, _, V = torch.svd_lowrank(part(W, b, slice(None)), q=q, niter=TURNS)
    else:
        U, V = by_parts(W, b, q)
    return U, V


def part(W: Tensor, b: Tensor | None, rows: slice) -> Tensor:
    """Some rows of [W | b], in single precision."""
    if b is None:
        return W[rows].float()
    taken = W[rows]
    found = torch.empty(len(taken), W.shape[1] + 1, dtype=torch.float32, device=W.device)
    found[:, :-1] = taken
    found[:, -1] = b.detach().flatten()[rows]
    return found


def by_parts(W: Tensor, b: Tensor | None, q: int) -> tuple[Tensor, Tensor]:
    """What torch.svd_lowrank does (Halko et al. 2011, algorithm 5.1), with a part of the rows at a time."""
    rows, columns = W.shape[0], W.shape[1] + (b is not None)
    step = max(1, LARGE // 16 // columns)

    def parts() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, rows, step):
            at = slice(start, start + step)
            yield at, part(W, b, at)

    def across(X: Tensor) -> Tensor:
        return torch.cat([P @ X for _, P in parts()])

    def down(X: Tensor) -> Tensor:
        total = torch.zeros(columns, X.shape[1], dtype=torch.float32, device=W.device)
        for at, P in parts():
            total += P.mT @ X[at]
        return total

    go, back, wide = (across, down, columns) if rows >= columns else (down, across, rows)
    Q = torch.linalg.qr(go(torch.randn(wide, q, dtype=torch.float32, device=W.device)))[0]
    for _ in range(TURNS):
        Q = torch.linalg.qr(go(torch.linalg.qr(back(Q))[0]))[0]
    U, _, Vh = torch.linalg.svd(back(Q).mT, full_matrices=False)
    return (Q @ U, Vh.mT) if rows >= columns else (Vh.mT, Q @ U)
