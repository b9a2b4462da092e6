"""Transformer Engine's `Linear` and its like: an ordinary weight, or one in FP8 that says itself how to dequantise.

Source: the documentation of `transformer_engine.pytorch`: `fp8_model_init` (`quantized_model_init`) makes weights that
are tensors of its own classes, with `dequantize(dtype=...)` and `quantize_(tensor)`, which rounds numbers into the
tensor in place with its own quantizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.storage import Packed, Payload


class Tensors(Packed):
    """Any quantised tensor of Transformer Engine. The payload is the parameter itself: a new one takes its place."""

    names = ("transformer_engine.pytorch.*Tensor",)
    label = "te"

    def take(self, module: nn.Module, name: str) -> Payload:
        return {"held": getattr(module, name)}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        module._parameters[name] = payload["held"]

    def unpack(self, payload: Payload) -> Tensor:
        return payload["held"].detach().dequantize(dtype=torch.float32)

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        new = payload["held"].detach().clone()
        new.quantize_(value.detach())
        return {"held": nn.Parameter(new, requires_grad=False)}

    def sample(self, module: nn.Module, name: str) -> Any:
        return getattr(module, name, None)

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        return tuple(getattr(module, name).shape)

    def key(self, module: nn.Module, name: str) -> None:
        return None  # its parts change without a trace

    def payload_key(self, payload: Any) -> None:
        return None
