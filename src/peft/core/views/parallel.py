"""Megatron's parallel layers: their sizes have other names, and they return the output together with a bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear import Layer, LinearView, Pair

_HERE = ".tensor_parallel.layers"  # in megatron.core, or in a copy of it by another name
_KINDS = ("ColumnParallelLinear", "RowParallelLinear")


class ParallelView(LinearView):
    """`ColumnParallelLinear` and `RowParallelLinear`, found by the names of their classes.

    A call gives (W x + b, None), or (W x, b) with `skip_bias_add`. An adapter's W' x + b' goes into the first, and the
    second becomes zeros, as adapters may change b and the model around adds what it gets. The weight has to lie whole
    on each process: a tensor-parallel size of 1. Source: the documentation of megatron.core.tensor_parallel.layers.
    """

    def shape(self, m: Layer) -> Pair:
        out, inp = (
            getattr(m, f"{name}_size_per_partition", getattr(m, f"{name}_size")) for name in ("output", "input")
        )
        whole = (m.output_size, m.input_size)
        if (out, inp) != whole or m.weight is None:
            held = "no weight of its own" if m.weight is None else f"{(out, inp)} of a weight {whole}"
            raise ValueError(
                f"This {type(m).__name__} holds {held}. Adapters need all of it on each process: run with a "
                "tensor-parallel size of 1, and with weights that the layers hold themselves."
            )
        return whole

    def output(self, given: Any) -> Tensor:
        y: Tensor = given[0]
        return y if given[1] is None else y + given[1]

    def finishes(self, m: Layer) -> bool:
        return True

    def finish(self, m: Layer, y: Tensor) -> Any:
        return y, torch.zeros_like(m.bias) if m.skip_bias_add and m.bias is not None else None


def is_parallel(kind: type) -> bool:
    """Whether a class is one of Megatron's parallel layers."""
    return any(c.__qualname__ in _KINDS and c.__module__.endswith(_HERE) for c in kind.__mro__)
