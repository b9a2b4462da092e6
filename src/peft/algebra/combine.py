"""The updates of several adapters on one layer made into one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import nearest
from ..kernels.modes import single
from .factors import Cut, Pair, Spectrum, joined
from .tensors import Sign, combination, task_arithmetic
from .update import Update

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
ON_PRODUCTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
WHOLE = ("cat", "exact")
TYPES = (*ON_FACTORS, *ON_PRODUCTS, *WHOLE)


@dataclass
class Recipe:
    """How updates are combined.

    Arguments:
        kind: the combination type, one of `TYPES`.
        rank: the rank of a decomposition; None: the largest of the sources.
        clamp: quantile at which the factors of a decomposition are cut.
        driver: of the decomposition, on CUDA.
        density: the share of entries that pruning keeps.
        sign: how TIES elects signs.
        default: the rank where neither `rank` nor a source says one.
        energy: the share of each squared norm that a decomposition keeps, instead of a rank.
        advice: what to do where truncation leaves out much.
    """

    kind: str = "svd"
    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None
    density: float | None = None
    sign: Sign = "total"
    default: int = 8
    energy: float | None = None
    advice: str = "Give a larger svd_rank, or combination_type='exact'."

    def check(self, prunes: bool = True) -> None:
        """Raise ValueError or TypeError for what cannot be; `prunes`: whether there is anything to prune."""
        if self.kind not in TYPES:
            raise ValueError(
                f"combination_type={self.kind!r} is unknown.{nearest(str(self.kind), TYPES)} Use one of "
                f"{', '.join(TYPES)}."
            )
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"svd_rank={self.rank!r} is no rank. Give a whole number of at least 1, or None.")
        if self.clamp is not None and not 0 <= self.clamp <= 1:
            raise ValueError(f"svd_clamp={self.clamp!r} is no quantile. Give a number in [0, 1], or None.")
        pruned = prunes and self.kind.startswith(("ties", "dare", "magnitude"))
        if pruned and self.density is None:
            raise TypeError(f"combination_type={self.kind!r} prunes: give `density`, the share of entries to keep.")
        if pruned and not isinstance(self.density, (int, float)):
            raise TypeError(f"density={self.density!r} is no number. Give the share of entries to keep, in (0, 1].")
        if pruned and not self.density >= 0:  # type: ignore[operator]
            raise ValueError(f"density={self.density} is negative. Give the share of entries to keep, in (0, 1].")
        if self.sign not in ("total", "frequency"):
            raise RuntimeError(f"majority_sign_method={self.sign!r} is unknown. Use 'total' or 'frequency'.")

    @property
    def plain(self) -> bool:
        """Whether it is the weighted sum, before any decomposition."""
        return self.kind in ("linear", "svd", *WHOLE)

    @property
    def unpruned(self) -> str:
        """The type that differs by pruning nothing, which is for what several sources have in common."""
        return "svd" if self.kind in ON_PRODUCTS else "linear" if self.kind in ON_FACTORS else self.kind

    @property
    def function(self) -> Callable[[list[Tensor], Tensor], Tensor]:
        """C(t_1 ..., c_1 ...)."""
        return combination(self.kind, self.density, self.sign)


class Result(NamedTuple):
    """One layer of the new adapter.

    Attributes:
        pair: its factors, B A the update.
        error: what a decomposition has left out, relative to the whole.
        enough: the rank that would leave out less than a hundredth, where it is known.
        bias: b' - b, or None.
        magnitude: DoRA's m, (..., O), or None.
    """

    pair: Pair
    error: float = 0.0
    enough: int | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@torch.no_grad()
def combine(updates: list[Update], recipe: Recipe, dora: bool = False) -> Result:
    """The combination of one layer's updates.

    Arguments:
        updates: the shares of the sources that stand here, with their weights.
        recipe: how.
        dora: combine what is inside DoRA and the magnitudes, each for itself.
    """
    factors = [u.inner_factors if dora else u.factors for u in updates]
    found = [f for f in factors if f is not None]
    complete = len(found) == len(updates)
    kind = recipe.kind
    if complete and kind in ON_FACTORS and all(u.p.settings.peft_type == "LORA" for u in updates):
        result = Result(_on_factors(updates, found, recipe))
    elif complete and recipe.plain:
        whole = joined([f.scaled(u.weight * u.scale) for f, u in zip(found, updates, strict=True)])
        result = Result(whole) if kind in WHOLE else _decomposed(whole, updates, recipe)
    else:
        dense = [u.dense(dora) for u in updates]
        tensors = [single(t) for t in dense]
        D = recipe.function(tensors, _weights(updates, tensors[0]))
        result = _decomposed(D, updates, recipe)
    magnitude = _magnitude(updates) if dora else None
    pair = result.pair.padded(1)  # a layer at which nothing is learnt has no rank, which no LoRA has
    return result._replace(pair=pair, bias=_bias(updates), magnitude=magnitude)


def _weights(updates: list[Update], like: Tensor) -> Tensor:
    return torch.tensor([u.weight for u in updates], dtype=like.dtype, device=like.device)


def _on_factors(updates: list[Update], factors: list[Pair], recipe: Recipe) -> Pair:
    """A and B, each combined for itself; the sign of a negative weight goes to A."""
    r = max(f.rank for f in factors)
    padded = [f.padded(r) for f in factors]
    g = torch.tensor([u.weight * u.scale for u in updates], dtype=factors[0].A.dtype, device=factors[0].A.device)
    root = g.abs().sqrt()
    A = recipe.function([f.A for f in padded], torch.where(g < 0, -root, root))
    return Pair(A, recipe.function([f.B for f in padded], root))


def _decomposed(matrix: Pair | Tensor, updates: list[Update], recipe: Recipe) -> Result:
    shape = (matrix.B.shape[-2], matrix.A.shape[-1]) if isinstance(matrix, Pair) else matrix.shape[-2:]
    dtype = torch.promote_types((matrix.A if isinstance(matrix, Pair) else matrix).dtype, torch.float32)
    exact = recipe.kind in WHOLE
    given = recipe.rank and -(-recipe.rank // updates[0].form.groups)
    wanted = given or max(u.rank for u in updates) or _own_rank(updates) or recipe.default
    share = 1.0 if exact else recipe.energy
    spectrum = Spectrum(matrix, min(wanted, *shape) if share is None else None, recipe.driver, recipe.energy)
    r = wanted if share is None else max(1, spectrum.rank(share))
    cut = spectrum.cut(r, dtype)
    enough = spectrum.rank(1 - 1e-4) if spectrum.complete and cut.error > 0.01 else None
    return Result(_clamped(cut, recipe).pair, cut.error, enough)


def _own_rank(updates: list[Update]) -> int:
    return max((r for u in updates if isinstance(r := getattr(u.p.settings, "r", 0), int)), default=0)


def _clamped(cut: Cut, recipe: Recipe) -> Cut:
    if recipe.clamp is None:
        return cut
    A, B = cut.pair
    high = torch.cat([B.flatten(), A.flatten()]).sort().values
    at = recipe.clamp * (high.numel() - 1)
    low = int(at)
    limit = torch.lerp(high[low], high[min(low + 1, high.numel() - 1)], at - low)
    return cut._replace(pair=Pair(A.clamp(-limit, limit), B.clamp(-limit, limit)))


def _bias(updates: list[Update]) -> Tensor | None:
    found = [(u.bias(), u.weight) for u in updates]
    parts = [b * w for b, w in found if b is not None]
    return torch.stack(parts).sum(0) if parts else None


def _magnitude(updates: list[Update]) -> Tensor:
    """|W| and the weighted changes of it that DoRA has learnt."""
    first = updates[0].p
    W = first.original_weight().float()
    norm = torch.linalg.vector_norm(W, dim=-1)
    tensors = [u.p.method.magnitude(u.p).float() for u in updates]
    if len(tensors) == 1 and updates[0].weight == 1:
        return tensors[0]
    return norm + task_arithmetic([m - norm for m in tensors], _weights(updates, norm))


def blended(tensors: list[Tensor], neutral: Any, weights: list[float]) -> Tensor:
    """neutral + the weighted sum of the tensors' differences from it; a single one of weight 1 is itself."""
    if len(tensors) == 1 and weights[0] == 1:
        return tensors[0]
    return neutral + sum(((t - neutral) * w for t, w in zip(tensors, weights, strict=True)), tensors[0] * 0)
