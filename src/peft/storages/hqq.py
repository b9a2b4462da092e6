"""HQQ: groups of low-bit integers with a scale and a zero point each, found by half-quadratic optimisation.

The numbers are unpacked and packed by the library's own `Quantizer`. Source: Badri and Shaji 2023, "Half-Quadratic
Quantization of Large Machine Learning Models"; `hqq.core.quantize`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.storage import Packed, Payload
from .borrowed import borrow


class HQQ(Packed):
    """`HQQLinear`: the module holds the integers as `W_q` and all else in `meta`."""

    names = ("hqq.core.quantize.HQQLinear",)
    label = "hqq"
    beside = ("W_q",)

    def take(self, module: nn.Module, name: str) -> Payload:
        held: Any = module
        settings = (held.quant_config or {}).get("weight_quant_params", {})
        return {"data": held.W_q.data, "meta": held.meta, "settings": settings, "dtype": held.compute_dtype}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        held: Any = module
        held.W_q.data = payload["data"]
        held.meta = payload["meta"]

    def unpack(self, payload: Payload) -> Tensor:
        return _quantizer().dequantize(payload["data"], payload["meta"])

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        meta, settings = payload["meta"], payload["settings"]
        made, new = _quantizer().quantize(
            value.detach().float(),
            nbits=meta["nbits"],
            channel_wise=settings.get("channel_wise", True),
            group_size=meta["group_size"],
            optimize=settings.get("optimize", True),
            round_zero=settings.get("round_zero", meta["nbits"] == 4),
            axis=meta["axis"],
            compute_dtype=payload["dtype"],
            view_as_float=meta["view_as_float"],
            device=str(value.device),
        )
        new = {k: t.to(meta[k].dtype) if isinstance(meta.get(k), Tensor) else t for k, t in new.items()}
        return {**payload, "data": made, "meta": {**meta, **new}}  # scales in the layer's dtype, as its forward needs

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        held: Any = module
        return tuple(held.meta["shape"])


def _quantizer() -> Any:
    return borrow("hqq.core.quantize", "Quantizer")


__all__ = ["HQQ"]
