"""Small floating-point codes and scaled blocks of them: what FP8, MXFP4 and NVFP4 weights are made of; packed integers.

A weight is code times scale, with one scale for each block of it. Sources: OCP 8-bit Floating Point Specification 1.0
(E4M3), OCP Microscaling Formats Specification 1.0 (E2M1, E8M0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

E4M3, E8M0 = torch.float8_e4m3fn, getattr(torch, "float8_e8m0fnu", None)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1, by the low three bits
# Between two magnitudes; the middle itself goes to the code that ends in 0, which is the upper one after these.
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_UPWARD = (0.75, 1.75, 3.5)


class Eight:
    """E4M3: a sign, four bits of exponent, three of mantissa; no infinity, and 448 is the largest number."""

    top = 448.0
    each = 1  # numbers in an element of what is stored

    @staticmethod
    def numbers(stored: Tensor) -> Tensor:
        """The values of codes, float32."""
        return stored.float()

    @staticmethod
    def codes(values: Tensor, like: Tensor) -> Tensor:
        """The nearest codes to values, ties to even; what is too large becomes the largest."""
        return values.clamp(-448.0, 448.0).to(like.dtype)


class Four:
    """E2M1: a sign, two bits of exponent, one of mantissa; two numbers in a byte, the first in its low half."""

    top = 6.0
    each = 2

    @staticmethod
    def numbers(stored: Tensor) -> Tensor:
        """The values of codes, float32, twice as many along the last axis."""
        table = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], dtype=torch.float32, device=stored.device)
        held = stored.view(torch.uint8).int()
        return table[torch.stack((held & 15, held >> 4), -1).flatten(-2)]

    @staticmethod
    def codes(values: Tensor, like: Tensor) -> Tensor:
        """The nearest codes to values, ties to even; what is too large becomes the largest."""
        edges = [math.nextafter(m, 0) if m in _UPWARD else m for m in _MIDDLES]
        bounds = torch.tensor(edges, dtype=torch.float64, device=values.device)
        found = torch.bucketize(values.abs().double(), bounds, out_int32=True)
        found = found + 8 * torch.signbit(values).int()
        low, high = found.unflatten(-1, (-1, 2)).unbind(-1)
        return (low | (high << 4)).to(torch.uint8).view(like.dtype)


def exponents(stored: Tensor) -> Tensor:
    """Bytes as numbers of E8M0. Raises RuntimeError under a torch that has none."""
    if E8M0 is None:
        raise RuntimeError(f"Scales of E8M0 need torch 2.7 or newer, this is {torch.__version__}. Install a newer one.")
    return stored.view(E8M0)


def power(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """2 to the power that `rounded` makes of log2 x, within what E8M0 can hold, float32."""
    mantissa, exponent = torch.frexp(x.float())
    exact = mantissa == 0.5  # x is a power of two, which a logarithm might miss
    least = exponent - 1
    found = torch.where(exact, least, rounded(torch.log2(x.float())).int().clamp(least, least + 1))
    return torch.ldexp(torch.ones_like(mantissa), found.clamp(-127, 127))


def split(value: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A tensor cut into blocks, (counts[0], sizes[0], counts[1], sizes[1], ...), filled up with zeros at the ends."""
    short = [n * s - have for n, s, have in zip(counts, sizes, value.shape, strict=True)]
    if any(short):
        value = torch.nn.functional.pad(value, [pad for n in reversed(short) for pad in (0, n)])
    return value.reshape([n for pair in zip(counts, sizes, strict=True) for n in pair])


def spread(scale: Tensor, shape: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The scale of each number, from that of each block; broadcast where a block is as large as the tensor."""
    for axis, (size, length) in enumerate(zip(sizes, shape, strict=True)):
        if scale.shape[axis] > 1 and size > 1:
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, length)
    return scale


def block_sizes(counts: Sequence[int], shape: Sequence[int], given: Sequence[int] | None = None) -> tuple[int, ...]:
    """The size of a block on each axis, where `counts` of them cover a tensor.

    Arguments:
        counts: how many blocks lie along each axis.
        shape: of the tensor.
        given: the sizes along the last axes, where they are stated; a last block that is not full hides its size.
    """
    sizes = [-(-length // n) for length, n in zip(shape, counts, strict=True)]
    for axis in range(1, 1 + len(given or ())):
        stated = (given or ())[-axis]
        if -(-shape[-axis] // stated) == counts[-axis]:
            sizes[-axis] = stated
    return tuple(sizes)


def best(value: Tensor, sizes: Sequence[int], scales: Iterable[Tensor], rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """For each block that of several scales with which it is held most closely; the first of those that do as well.

    Arguments:
        value: the numbers.
        sizes: of a block, on each axis.
        scales: each of one number per block.
        rounded: (a scale for each number) -> the numbers as they would be held.
    """
    found, least = None, None
    for scale in scales:
        error = split((rounded(spread(scale, value.shape, sizes)) - value).square(), scale.shape, sizes)
        error = torch.nan_to_num(error.sum([2 * i + 1 for i in range(value.dim())]), nan=torch.inf)
        if found is None or least is None:
            found, least = scale, error
        else:
            better = error < least
            found, least = torch.where(better, scale, found), torch.where(better, error, least)
    assert found is not None
    return found


def peaks(value: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The largest magnitude in each block."""
    return split(value.abs(), counts, sizes).amax([2 * i + 1 for i in range(value.dim())])


def unpacked(words: Tensor, bits: int, order: Sequence[int] = (), tight: bool = True) -> Tensor:
    """The unsigned integers in words, along the first axis; the first lies in the lowest bits.

    Arguments:
        words: (n, ...), integers of any width.
        bits: of each number.
        order: which number of a word lies at each of its places; none: they lie as they come.
        tight: where the width is no multiple of `bits`, numbers run over into the next word; else high bits stay free.
    """
    width = 8 * words.dtype.itemsize
    words = words if width >= 32 else words.int()
    if width % bits and tight:
        start = torch.arange(len(words) * width // bits, device=words.device) * bits
        at = start.div(width, rounding_mode="floor")
        shift = (start % width).view(-1, *[1] * (words.dim() - 1))
        wide = words.long() & (2**width - 1)
        pair = (wide[at] >> shift) | (wide[(at + 1).clamp(max=len(words) - 1)] << (width - shift))
        return (pair & (2**bits - 1)).int()
    places = torch.arange(width // bits, device=words.device, dtype=words.dtype) * bits
    found = (words[:, None] >> places.view(-1, *[1] * (words.dim() - 1))) & (2**bits - 1)
    if order:
        found = found[:, [order.index(i) for i in range(len(order))]]
    return found.flatten(0, 1).int()


def packed(numbers: Tensor, bits: int, dtype: torch.dtype, order: Sequence[int] = (), tight: bool = True) -> Tensor:
    """The inverse of `unpacked`: words of a dtype; what the last of them has room for beyond the numbers is zero."""
    width = 8 * dtype.itemsize
    numbers = numbers.long()
    if width % bits and tight:
        start = torch.arange(len(numbers), device=numbers.device) * bits
        at = start.div(width, rounding_mode="floor")
        shift = (start % width).view(-1, *[1] * (numbers.dim() - 1))
        shape = (-(-len(numbers) * bits // width) + 1, *numbers.shape[1:])
        whole = torch.zeros(shape, dtype=torch.long, device=numbers.device)
        whole.index_add_(0, at, (numbers << shift) & (2**width - 1))
        whole.index_add_(0, at + 1, numbers << shift >> width)
        return _signed(whole[:-1], width).to(dtype)
    each = width // bits
    spare = torch.zeros((-len(numbers) % each, *numbers.shape[1:]), dtype=torch.long, device=numbers.device)
    numbers = torch.cat((numbers, spare)).unflatten(0, (-1, each))
    if order:
        numbers = numbers[:, list(order)]
    places = torch.arange(each, device=numbers.device) * bits
    whole = (numbers << places.view(-1, *[1] * (numbers.dim() - 2))).sum(1)
    return _signed(whole, width).to(dtype)


def _signed(words: Tensor, width: int) -> Tensor:
    """Unsigned words as the signed ones of the same bits."""
    return words if width == 64 else torch.where(words >= 2 ** (width - 1), words - 2**width, words)
