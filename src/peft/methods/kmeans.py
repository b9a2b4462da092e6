"""k-means by Lloyd's iterations, with the draws and the rules of scikit-learn's, so that both give the same labels.

Labels are not kept in files, so another rule for a tie, an empty cluster or the end would deal rows out otherwise.
Source: Lloyd 1982; the order of draws and the stopping rule are those of scikit-learn's KMeans (init="random").
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the mean variance: centres that move less are at rest


def labels(points: Tensor, clusters: int, rounds: int, seed: int) -> Tensor:
    """The cluster of each row of `points`, (n, d): one start at random rows, at most `rounds` iterations."""
    X = np.ascontiguousarray(points.detach().cpu().float().numpy())
    n = len(X)
    limit = np.mean(np.var(X, axis=0)) * TOLERANCE
    X = X - X.mean(axis=0)
    start = np.random.RandomState(seed).choice(n, size=clusters, replace=False, p=np.full(n, 1 / n, X.dtype))
    centres, before = X[start], np.full(n, -1)
    for _ in range(rounds):
        found = _nearest(X, centres)
        new = _means(X, centres, found)
        shift, centres = np.square(new - centres).sum(), new
        if np.array_equal(found, before):
            return torch.from_numpy(found)
        if shift <= limit:
            break
        before = found
    return torch.from_numpy(_nearest(X, centres))


def _nearest(X: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The centre nearest to each point, the first of several; rounded as there, for points equally far from all."""
    return np.argmin(np.einsum("ij,ij->i", centres, centres) - 2 * (X @ centres.T), axis=1)


def _means(X: np.ndarray, centres: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The mean of each cluster; an empty one takes the point farthest from its centre out of that one's cluster."""
    k = len(centres)
    weight = np.bincount(found, minlength=k).astype(X.dtype)
    sums = np.zeros_like(centres)
    np.add.at(sums, found, X)
    empty = np.flatnonzero(weight == 0)
    distance = np.square(X - centres[found]).sum(1) if len(empty) else np.zeros(1, X.dtype)
    if distance.max() > 0:
        far = np.argpartition(distance, -len(empty))[: -len(empty) - 1 : -1]
        for cluster, point in zip(empty, far, strict=True):
            sums[found[point]] -= X[point]
            weight[found[point]] -= 1
            sums[cluster], weight[cluster] = X[point], 1
    sums[weight > 0] *= 1 / weight[weight > 0, None]
    sums[weight == 0] = sums[np.argmax(weight)]
    return sums
