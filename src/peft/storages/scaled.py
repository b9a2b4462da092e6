"""Weights that are codes times the scales of blocks: how they are read, and rounded with new or with their old scales.

A storage of this kind states where its codes and scales lie; the arithmetic is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.storage import Packed, Payload
from .codes import E4M3, E8M0, Eight, Four, best, block_sizes, peaks, power, spread


class Scaled(Packed):
    """Codes and scales of blocks.

    A payload holds "codes" and "scale" as they are stored, "over" (a number by which all scales are multiplied, or
    None), "sizes" (of a block where they are known, else None), or only "dense".
    """

    def unpack(self, payload: Payload) -> Tensor:
        if "dense" in payload:
            return payload["dense"]
        numbers = kind_of(payload).numbers(payload["codes"])
        return numbers.mul_(spread(factor(payload, payload["scale"]), numbers.shape, _sizes(payload, numbers.shape)))

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        if "dense" in payload:
            return {"dense": value.to(payload["dense"].dtype)}
        value, kind = value.detach().float(), kind_of(payload)
        sizes = _sizes(payload, value.shape)
        payload = self.widened(value, payload)
        counts = factor(payload, payload["scale"]).shape
        tried = [held.float().view(counts) for held in scales(payload, peaks(value, counts, sizes) / kind.top)]

        def rounded(scale: Tensor) -> Tensor:
            whole = factor(payload, scale)
            return kind.numbers(kind.codes(_divided(value, whole), payload["codes"])) * whole

        chosen = best(value, sizes, tried, rounded)
        return self.repack(value, {**payload, "scale": chosen.to(payload["scale"].dtype).view_as(payload["scale"])})

    def repack(self, value: Tensor, payload: Payload) -> Payload:
        if "dense" in payload:
            return self.pack(value, payload)
        value = value.detach().float()
        whole = spread(factor(payload, payload["scale"]), value.shape, _sizes(payload, value.shape))
        return {**payload, "codes": kind_of(payload).codes(_divided(value, whole), payload["codes"])}

    def widened(self, value: Tensor, payload: Payload) -> Payload:
        """The payload with a factor of all scales that makes room for the largest number."""
        return payload

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        payload = self.take(module, name)
        return payload["dense"].dtype if "dense" in payload else torch.float32

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        payload = self.take(module, name)
        if "dense" in payload:
            return tuple(payload["dense"].shape)
        *lead, last = payload["codes"].shape
        return (*lead, last * kind_of(payload).each)


def kind_of(payload: Payload) -> Any:
    """The code of a payload, told by the dtype that holds it."""
    return Eight if payload["codes"].dtype.itemsize == 1 and payload["codes"].is_floating_point() else Four


def factor(payload: Payload, scale: Tensor) -> Tensor:
    """What the codes of each block are multiplied with, float32, on as many axes as the weight has."""
    made = scale.float()
    if (over := payload.get("over")) is not None:
        made = made * over.float()
    dims = payload["codes"].dim()
    return made if made.dim() == dims else made.reshape((1,) * (dims - made.dim()) + tuple(made.shape))


def scales(payload: Payload, wanted: Tensor) -> Iterator[Tensor]:
    """The scales with which blocks are tried: the old ones, and those nearest to the wanted ones that can be stored."""
    old = payload["scale"]
    yield old
    if (over := payload.get("over")) is not None:
        wanted = wanted / over.float()
    wanted = torch.where(wanted > 0, wanted, old.float().view(wanted.shape))
    if old.dtype == E8M0:
        yield power(wanted, torch.ceil)
        yield power(wanted, torch.floor)
    elif old.dtype == E4M3:
        yield wanted.clamp(2.0**-9, 448.0).to(E4M3)
    else:
        yield wanted.to(old.dtype)


def _sizes(payload: Payload, shape: Any) -> tuple[int, ...]:
    return block_sizes(factor(payload, payload["scale"]).shape, shape, payload.get("sizes"))


def _divided(value: Tensor, whole: Tensor) -> Tensor:
    """What a code has to hold; where the scale is zero nothing can be held."""
    return torch.where(whole == 0, value.new_zeros(()), value / whole)


def place(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Put a tensor where a module holds one of this name: in the parameter there if it fits, else in place of it."""
    held = module._parameters.get(name)
    if value is None:
        module._parameters.pop(name, None)
    elif name in module._buffers:
        module._buffers[name] = value
    elif held is not None and held.dtype == value.dtype and held.shape == value.shape:
        held.data = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def aside(tensor: Tensor | None) -> Tensor | None:
    """A tensor as it lies, apart from autograd; in-place changes of the one are seen in the other's version."""
    return None if tensor is None else tensor.detach()
