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
        distances = _distances(X, centres)
        found = np.argmin(distances, axis=1)
        new = _means(X, centres, found)
        shift, centres = np.square(new - centres).sum(), new
        if np.array_equal(found, before):
            return _nearest(points, distances)
        if shift <= limit:
            break
        before = found
    return _nearest(points, _distances(X, centres))


def _distances(X: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The square of the distance of each point from each centre, less that of the point; rounded as there."""
    return np.einsum("ij,ij->i", centres, centres) - 2 * (X @ centres.T)


def _nearest(points: Tensor, distances: np.ndarray) -> Tensor:
    """The centre nearest to each point, the first of several; by torch, which a run without numbers answers."""
    held = points.detach().new_empty(distances.shape, dtype=torch.float32, device="cpu")
    return held.copy_(torch.from_numpy(-distances)).argmax(1)


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
