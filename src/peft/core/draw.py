"""Random numbers that several methods draw: first values, and places of a matrix that follow from a seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..kernels.modes import lasting


@contextmanager
def usual_defaults() -> Iterator[None]:
    """While open, modules that do not say otherwise are made of float32, on the CPU."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def check_numbers(module: nn.Module, path: str) -> None:
    """Raise ValueError if a new module has parameters without numbers, as under accelerate's `init_empty_weights`."""
    if any(p.is_meta for p in module.parameters()):
        raise ValueError(
            f"The parameters of {path} have no first values: something puts new modules on the meta device, as "
            "accelerate's init_empty_weights does. Make the base model in its block, and the adapter after it."
        )


def kaiming(t: Tensor, dims: int = 2) -> None:
    """Fill t, a stack of tensors of this many axes, uniformly on +-1/sqrt(n), n being the elements of one row."""
    bound = 1 / math.sqrt(max(1, math.prod(t.shape[t.dim() - dims + 1 :])))
    t.uniform_(-bound, bound)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """N(0, 1) from a generator, float32: the same whatever torch's default dtype and device are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def places(out: int, inp: int, n: int, seed: int | None) -> Tensor:
    """n different places of an (out, inp) matrix as flat indices, the same for every matrix of this shape.

    They are the first of a permutation that torch's default generator on the CPU draws from the seed; without one,
    from the seed that a new generator has.
    """
    made = _places if lasting() else _places.__wrapped__
    return made(out * inp, n, seed).clone()


@functools.lru_cache(maxsize=16)
def _places(count: int, n: int, seed: int | None) -> Tensor:
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(count, generator=generator, device="cpu")[:n].clone()


def triplets(W: Tensor, q: int, iterations: int, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """About the q largest singular triplets, U, S and V', from a sketch, after so many subspace iterations.

    With a seed they are the same at every time, on any device and in any dtype, and the caller's random numbers stay
    his. Source: Halko et al. 2011, algorithms 4.4 and 5.1.
    """
    if seed is None:
        U, S, V = torch.svd_lowrank(W, q=q, niter=iterations)
        return U, S, V.mT
    tall = W.shape[-2] >= W.shape[-1]
    M = W if tall else W.mT
    Q = torch.linalg.qr(M @ normal((M.shape[-1], q), torch.Generator().manual_seed(seed)).to(M))[0]
    for _ in range(iterations):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q)[0])[0]
    U, S, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return (Q @ U, S, Vh) if tall else (Vh.mT, S, (Q @ U).mT)


def check_count(name: str, n: int, most: int, path: str, way: str) -> None:
    """Raise ValueError if a matrix has fewer than n elements; `way` says what takes fewer, if anything does."""
    if n > most:
        raise ValueError(
            f"{name}={n} is more than the {most} elements that the weight of {path!r} has. "
            f"{f'{way}, or exclude' if way else 'Exclude'} the layer (`exclude_modules`)."
        )


def scatter(values: Tensor, at: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of this shape, (..., O, I), with values (..., n) at the places `at`, (2, n): rows and columns."""
    return spread(values, (at[0].long() * shape[-1] + at[1].long()).expand(values.shape), shape)


def spread(values: Tensor, at: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of this shape, (..., O, I), with values (..., n) at the places `at`, (..., n), of each flattened matrix."""
    zeros = values.new_zeros(*shape[:-2], shape[-2] * shape[-1])
    return zeros.scatter(-1, at, values).unflatten(-1, shape[-2:])
