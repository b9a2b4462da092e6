"""AQLM: each group of weights is a sum of vectors, one from each code-book, times a scale for its rows.

    W[o, i] = scale[o] * sum over c of codebooks[c, codes[o, i, c]]        for a group o of rows and i of columns

Source: Egiazarian et al. 2024, arXiv 2401.06118, and the `aqlm` package's `QuantizedLinear`: codes (O/go, I/gi, C)
in two's complement, codebooks (C, 2^bits, go, gi), scales (O/go, 1, 1, 1). A sum that is nearest to given numbers is
found by a search over a whole model's data, which no merge can stand in for, so numbers are not written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.storage import Packed, Payload


class AQLM(Packed):
    """`QuantizedLinear`, read exactly."""

    names = ("aqlm.inference.QuantizedLinear",)
    label = "aqlm"
    beside = ("codes", "codebooks", "scales")

    def take(self, module: nn.Module, name: str) -> Payload:
        m: Any = module
        return {"codes": m.codes.data, "books": m.codebooks.data, "scale": m.scales.data, "turned": _turned(m)}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        m: Any = module
        codes = payload["codes"]
        if payload["turned"] != _turned(m):  # it has run since, and keeps them the other way round now
            codes = codes.transpose(0, 1).contiguous()
        m.codes.data, m.codebooks.data, m.scales.data = codes, payload["books"], payload["scale"]

    def unpack(self, payload: Payload) -> Tensor:
        codes, books = payload["codes"], payload["books"]
        codes = codes.transpose(0, 1) if payload["turned"] else codes
        index = codes.long() % books.shape[1]  # two's complement
        groups = sum(book[index[..., c]] for c, book in enumerate(books)) * payload["scale"]
        rows, columns, high, wide = groups.shape
        return groups.transpose(1, 2).reshape(rows * high, columns * wide)

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        if torch.equal(value, self.unpack(payload).to(value.dtype)):
            return payload
        raise NotImplementedError(
            "No numbers can be written into a weight of AQLM: its codes come from a search over data. Merge with "
            'quantized="dequantize", or keep the adapter unmerged.'
        )

    def sample(self, module: nn.Module, name: str) -> Any:
        return getattr(module, "codebooks", None)

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        m: Any = module
        return (m.out_features, m.in_features)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        m: Any = module
        return m.codebooks.dtype


def _turned(m: Any) -> bool:
    """Whether the first call on a CPU has put the columns of the codes before the rows, as its kernel there reads."""
    rows, columns = m.out_features // m.out_group_size, m.in_features // m.in_group_size
    if rows != columns:
        return m.codes.shape[0] == columns
    return getattr(m, "gemm_op", None) is not None and m.codebooks.shape[1] == 256 and m.codes.device.type == "cpu"
