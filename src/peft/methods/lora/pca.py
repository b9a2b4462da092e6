"""Principal components of data that comes in batches.

The components of all rows so far follow from those of the rows before and of the new ones, as the singular value
decomposition of

    [ diag(S) V' ;  X - mean(X) ;  sqrt(n m / (n + m)) (mean before - mean(X)) ]

for n rows before and m new ones. Source: Ross et al. 2008, Incremental Learning for Robust Visual Tracking, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.draw import triplets
from ...kernels.modes import NARROW


class IncrementalPCA:
    """Principal components, batch by batch.

    Arguments:
        n_components: how many; None: as many as rows or features allow.
        copy: leave the data as it is.
        batch_size: rows that `fit` takes at once; None: five times the features.
        svd_driver: of torch.linalg.svd, on CUDA.
        lowrank: decompose by a sketch of `lowrank_q` columns and `lowrank_niter` subspace iterations.
        lowrank_q: twice `n_components` if None.
        lowrank_niter: more is more exact.
        lowrank_seed: makes the sketch the same each time.

    Attributes, once fitted:
        components_ (n, d), singular_values_ (n,), mean_ (d,), var_ (d,), explained_variance_ (n,),
        explained_variance_ratio_ (n,), noise_variance_, n_samples_seen_, n_features_
    """

    mean_: Tensor
    var_: Tensor
    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    noise_variance_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ):
        self.n_components, self.copy, self.batch_size, self.svd_driver = n_components, copy, batch_size, svd_driver
        self.lowrank, self.lowrank_q, self.lowrank_niter, self.lowrank_seed = (
            lowrank, lowrank_q, lowrank_niter, lowrank_seed,
        )  # fmt: skip
        self.n_features_: int | None = None
        self.n_samples_seen_ = torch.zeros(1, dtype=torch.int64, device="cpu")
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            self.lowrank_q = 2 * n_components
        elif lowrank and lowrank_q is not None and n_components is not None and lowrank_q < n_components:
            raise ValueError("lowrank_q must be greater than or equal to n_components.")

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Forget what was seen; take the rows of X (rows, d) in batches."""
        X = self._checked(X) if check_input else X
        self.n_features_, self.n_samples_seen_ = None, torch.zeros(1, dtype=torch.int64, device="cpu")
        size = self.batch_size = self.batch_size or 5 * X.shape[1]
        for part in self.gen_batches(len(X), size, self.n_components or 0):
            self.partial_fit(X[part], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Add the rows of X (rows, d).

        Raises ValueError if there are fewer rows, or features, than components, or another number of features.
        """
        X = self._checked(X) if check_input else X
        new, first = len(X), self.n_features_ is None
        if first:
            self._begin(X)
        elif X.shape[1] != self.n_features_:
            raise ValueError(f"The data has {X.shape[1]} features, the data before had {self.n_features_}.")
        seen = int(self.n_samples_seen_)
        total = seen + new
        batch_mean = X.mean(0)
        mean = batch_mean if first else self.mean_ + (batch_mean - self.mean_) * (new / total)
        apart = (X - batch_mean).square().sum(0)
        if first:
            rows, spread = X - batch_mean, apart
        else:
            shift = (self.mean_ - batch_mean) * (seen * new / total) ** 0.5
            spread = self.var_ * seen + apart + shift.square()
            rows = torch.cat([self.singular_values_[:, None] * self.components_, X - batch_mean, shift[None]])
        _, S, Vh = self._svd(rows)
        self._note(S, Vh, mean, spread / total, total)
        return self

    def transform(self, X: Tensor) -> Tensor:
        """The coordinates of the rows of X along the components."""
        X = X.to(self.components_)
        return (X - self.mean_) @ self.components_.mT

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of 0 ... n of `batch_size` each; what would leave fewer than `min_batch_size` is not cut off."""
        start = 0
        for _ in range(n // batch_size):
            end = start + batch_size
            if end + min_batch_size > n:
                continue
            yield slice(start, end)
            start = end
        if start < n:
            yield slice(start, n)

    def _checked(self, X: Any) -> Tensor:
        X = X if isinstance(X, Tensor) else torch.as_tensor(X, device="cpu")
        if X.dim() != 2:
            raise ValueError(f"The data must be a matrix (rows, features); got the shape {tuple(X.shape)}.")
        if not X.is_floating_point() or X.dtype in NARROW:
            X = X.float()
        elif self.copy:
            X = X.clone()
        n = self.n_components
        if n is not None and not 1 <= n <= X.shape[1]:
            raise ValueError(
                f"n_components={n} invalid for n_features={X.shape[1]}, need more rows than columns for IncrementalPCA "
                "processing."
            )
        if n is not None and self.n_features_ is None and n > len(X):
            raise ValueError(f"n_components={n} must be less or equal to the batch number of samples {len(X)}")
        return X

    def _begin(self, X: Tensor) -> None:
        self.n_features_ = X.shape[1]
        if self.n_components is None:
            self.n_components = min(X.shape)

    def _svd(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.lowrank_q or 0
        if not self.lowrank or q >= min(rows.shape):
            driver = self.svd_driver if rows.is_cuda else None
            return torch.linalg.svd(rows, full_matrices=False, driver=driver)
        return triplets(rows, q, self.lowrank_niter, self.lowrank_seed)

    def _note(self, S: Tensor, Vh: Tensor, mean: Tensor, var: Tensor, total: int) -> None:
        n = self.n_components or 0
        largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
        Vh = Vh * torch.where(largest < 0, -1, 1)  # the same sign each time
        variance = S.square() / max(1, total - 1)
        ratio = S.square() / (var * total).sum().clamp_min(torch.finfo(S.dtype).tiny)
        self.n_samples_seen_ = torch.tensor([total], device="cpu")
        self.components_, self.singular_values_, self.mean_, self.var_ = Vh[:n], S[:n], mean, var
        self.explained_variance_, self.explained_variance_ratio_ = variance[:n], ratio[:n]
        rest = variance[n:]
        self.noise_variance_ = rest.mean() if len(rest) and len(mean) > n else S.new_zeros(())
