"""Combinations of task tensors: what several adapters have learnt, tensor by tensor, made into one.

Sources: task arithmetic, Ilharco et al. 2023, arXiv 2212.04089; TIES, Yadav et al. 2023, arXiv 2306.01708; DARE, Yu et
al. 2024, arXiv 2311.03099. Letters: t_i the tensors, c_i their weights, rho the density.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import nearest

Sign = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """One weight for each tensor, shaped to broadcast over them."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The int(rho n) entries of largest magnitude, the others zero."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Each entry kept with probability rho, divided by rho if `rescale`."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def prune(tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False) -> Tensor:
    """The tensor with a share `density` of its entries kept.

    Raises TypeError without a density, ValueError for a negative one or an unknown method. From 1 on nothing is pruned,
    with a warning.
    """
    if density is None:
        raise TypeError("density is None, but this combination prunes: give the share of entries to keep, in (0, 1].")
    if density >= 1:
        warnings.warn(f"The density {density} is not below 1: nothing is pruned.", stacklevel=2)
        return tensor
    if density < 0:
        raise ValueError(f"density={density} is negative. Give the share of entries to keep, in (0, 1].")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale) if density else torch.zeros_like(tensor)
    raise ValueError(f"method={method!r} is unknown.{nearest(str(method), ('magnitude', 'random'))}")


def calculate_majority_sign_mask(tensor: Tensor, method: Sign = "total") -> Tensor:
    """Where each of the stacked tensors has the sign of their sum ("total") or of most of them ("frequency").

    Raises RuntimeError for another method.
    """
    sign = tensor.sign()
    if method == "total":
        sigma = tensor.sum(dim=0)
    elif method == "frequency":
        sigma = sign.sum(dim=0)
    else:
        raise RuntimeError(f"majority_sign_method={method!r} is unknown. Use 'total' or 'frequency'.")
    return sign == torch.where(sigma >= 0, 1.0, -1.0).to(sign.dtype)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean of the masked tensors, entry by entry, over those that the mask keeps."""
    count = majority_sign_mask.sum(dim=0).clamp(min=1.0)
    return (task_tensors * majority_sign_mask).sum(dim=0) / count


def _stacked(tensors: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(list(tensors))
    return stacked, reshape_weight_task_tensors(
        stacked, torch.as_tensor(weights, dtype=stacked.dtype, device=stacked.device)
    )


def _summed(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    stacked, factors = _stacked(tensors, weights)
    return (stacked * factors).sum(dim=0)


def _elected(tensors: Sequence[Tensor], weights: Tensor, sign: Sign) -> Tensor:
    stacked, factors = _stacked(tensors, weights)
    return disjoint_merge(stacked * factors, calculate_majority_sign_mask(stacked, sign))


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """The sum of c_i t_i."""
    return _summed(task_tensors, weights)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The sum of c_i t_i, each cut to its largest entries."""
    return _summed([prune(t, density, "magnitude") for t in task_tensors], weights)


def ties(task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total") -> Tensor:
    """TIES: each t_i cut to its largest entries, and of those the mean over the ones that have the elected sign."""
    return _elected([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """DARE: the sum of c_i t_i, entries dropped by chance and the rest rescaled."""
    return _summed([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total"
) -> Tensor:
    """DARE's dropping, then the sign election of TIES."""
    pruned = [prune(t, density, "random", rescale=True) for t in task_tensors]
    return _elected(pruned, weights, majority_sign_method)


def combination(kind: str, density: float | None, sign: Sign) -> Callable[[list[Tensor], Tensor], Tensor]:
    """C(t_1 ..., c_1 ...) of a combination type, with or without "_svd" at its end."""
    name = kind.removesuffix("_svd")
    if name == "magnitude_prune":
        return lambda tensors, weights: magnitude_prune(tensors, weights, density)  # type: ignore[arg-type]
    if name == "dare_linear":
        return lambda tensors, weights: dare_linear(tensors, weights, density)  # type: ignore[arg-type]
    if name in ("ties", "dare_ties"):
        function = ties if name == "ties" else dare_ties
        return lambda tensors, weights: function(tensors, weights, density, sign)  # type: ignore[arg-type]
    return task_arithmetic
