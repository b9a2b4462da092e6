"""Random numbers that several methods draw: first values, and places of a matrix that follow from a seed."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def kaiming(t: Tensor, dims: int = 2) -> None:
    """Fill t, a stack of tensors of this many axes, uniformly on +-1/sqrt(n), n being the elements of one row."""
    bound = 1 / math.sqrt(max(1, math.prod(t.shape[t.dim() - dims + 1 :])))
    t.uniform_(-bound, bound)


def places(out: int, inp: int, n: int, seed: int | None) -> Tensor:
    """n different places of an (out, inp) matrix as flat indices, the same for every matrix of this shape.

    They are the first of a permutation that torch's default generator on the CPU draws from the seed; without one,
    from the seed that a new generator has.
    """
    return _places(out * inp, n, seed).clone()


@functools.lru_cache(maxsize=16)
def _places(count: int, n: int, seed: int | None) -> Tensor:
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(count, generator=generator, device="cpu")[:n].clone()
