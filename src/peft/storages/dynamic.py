"""torch's dynamically quantised linear layers, which `torch.ao.quantization.quantize_dynamic` puts in place of others.

Source: the documentation of `torch.ao.nn.quantized.dynamic.Linear`: `weight()` gives a tensor in eight bits that says
how to dequantise, or one of half precision, `bias()` the bias, and `set_weight_bias` takes both. Symmetric scales are
those of the largest number over the middle of the range, as torch's observers take them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.storage import Packed, Payload

RANGE = 127.5  # half of the steps of eight bits


class Layers(Packed):
    """A layer. The payload of either is both: the weight in the layer's own form, and the bias."""

    names = ("torch.ao.nn.quantized.dynamic.modules.linear.Linear",)
    weights = ("weight", "bias")
    label = "torch.ao"

    def take(self, module: nn.Module, name: str) -> Payload:
        held: Any = module
        return {"weight": held.weight(), "bias": held.bias(), "meant": name}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        held: Any = module
        held.set_weight_bias(payload["weight"], payload["bias"])

    def unpack(self, payload: Payload) -> Tensor:
        W: Tensor = payload[payload["meant"]]
        return W.dequantize() if W.is_quantized else W.float()

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        W, value = payload[payload["meant"]], value.detach().float()
        if not W.is_quantized:
            return {**payload, payload["meant"]: value.to(W.dtype)}
        if W.qscheme() is torch.per_tensor_affine:
            scale = value.abs().max().clamp_min(1e-30) / RANGE
            return {**payload, "weight": torch.quantize_per_tensor(value, float(scale), 0, W.dtype)}
        scales = value.abs().amax(1).clamp_min(1e-30) / RANGE
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        return {**payload, "weight": torch.quantize_per_channel(value, scales, zeros, 0, W.dtype)}

    def sample(self, module: nn.Module, name: str) -> Any:
        return self.take(module, name)[name]

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        return tuple(self.take(module, name)[name].shape)

    def key(self, module: nn.Module, name: str) -> None:
        return None  # the numbers are handed out as copies

    def payload_key(self, payload: Any) -> None:
        return None
