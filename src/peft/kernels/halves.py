"""Thin products of bfloat16 activations and float32 factors, on units that multiply bfloat16 alone.

A number in float32 is here the sum of two in bfloat16, its halves, which miss 2^-17 of it at most. Products of halves
are exact, and the units sum them in float32 before they round once. Where the result is bfloat16, that is all. Where
it is to be float32, a second product has the first subtracted before it is rounded, and so gives what rounding took:
16 bits and more in all, of numbers whose other factor has eight. No activation is cast. `thin` has the same in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .modes import lasting

MANY = 2**19  # elements of a result from which on halves are quicker than casts
MORE = 2**21  # elements of an input from which on two products are
SQUARE = 2**20  # and of a weight
HALF = torch.bfloat16


def suit(count: int, dtype: torch.dtype, factor: Tensor, least: int = MANY) -> bool:
    """Whether activations of `count` elements are better met with a factor's halves."""
    return count >= least and dtype is HALF and factor.dtype is torch.float32 and lasting() and able()


def matrix_units() -> bool:
    """Whether the processor multiplies whole tiles of bfloat16 (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@cache
def able() -> bool:
    """Whether there are matrix units, or vector ones (AVX-512), and torch sums as it is told above: tried once."""
    if not (matrix_units() or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()):
        return False
    numbers = torch.arange(4096, dtype=torch.float32, device="cpu")
    x = numbers.mul(0.618).frac().view(64, 64).to(HALF)
    for r in (1, 8, 33):
        t = numbers[: 64 * r].mul(0.414).frac().view(64, r)
        for found, exact in ((wide(x, t), x.double() @ t.double()), (across(t, x), t.double().T @ x.double())):
            if not (found.double() - exact).abs().max() < 2**-14 * exact.abs().max():
                return False
    return True


def onto(y: Tensor, h: Tensor, t: Tensor) -> Tensor:
    """y + h t in y's memory, of y (N, k) in bfloat16, h (N, r) and t (r, k) in float32; t may be a transpose."""
    return y.addmm_(*_factors(h, t))


def product(h: Tensor, t: Tensor) -> Tensor:
    """h t in bfloat16."""
    return torch.mm(*_factors(h, t))


def wide(x: Tensor, t: Tensor) -> Tensor:
    """x t in float32, of x (N, d) in bfloat16 and t (d, r) in float32; either may be a transpose."""
    r = t.shape[1]
    both = x @ _of(t, 1, (0, 1))
    rest = torch.addmm(both[:, :r], x, t.to(HALF), beta=-1)
    return torch.cat((both, rest), 1).float().view(-1, 3, r).sum(1)


def across(h: Tensor, x: Tensor) -> Tensor:
    """h' x in float32, (r, d), of h (N, r) in float32 and x (N, d) in bfloat16."""
    both = _of(h, 1, (0, 1)).t() @ x
    rest = torch.addmm(both[: h.shape[1]], h.to(HALF).t(), x, beta=-1)
    return torch.cat((both, rest)).float().view(3, -1, x.shape[1]).sum(0)


def _factors(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return _of(h, 1, (0, 1, 0)), _of(t, 0, (0, 0, 1))


def _of(t: Tensor, axis: int, order: tuple[int, ...]) -> Tensor:
    """A tensor's halves behind each other: 0 for the high one, 1 for the low one; a transpose gives one."""
    if t.stride(0) < t.stride(1):
        return _of(t.t(), 1 - axis, order).t()
    high = t.to(HALF)
    both = high, (t - high.float()).to(HALF)
    return torch.cat([both[i] for i in order], axis)
