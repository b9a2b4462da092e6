"""torchao: tensor subclasses that hold integers or float8 with scales, and say themselves how to dequantise.

They are packed anew by the class's own constructor from dense numbers, with the settings read off the old tensor.
Source: torchao's documentation of `quantize_` and of the tensor classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.storage import Packed, Payload


class TorchAO(Packed):
    """Any weight tensor of torchao that has `dequantize`."""

    names = ("torchao.*",)
    label = "torchao"

    def take(self, module: nn.Module, name: str) -> Payload:
        return {"tensor": getattr(module, name)}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        module._parameters[name] = nn.Parameter(payload["tensor"], requires_grad=False)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return getattr(module, name).dtype

    def unpack(self, payload: Payload) -> Tensor:
        return payload["tensor"].dequantize()

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        raise NotImplementedError


__all__ = ["Any", "TorchAO", "torch"]
