"""NVFP4 and its like as ModelOpt and compressed-tensors hold them in linear layers.

NVFP4: E2M1 codes, two in a byte with the first in its low half; an E4M3 scale for each 16 of a row; one float32 factor
of all scales. Sources: NVIDIA's documentation of ModelOpt (`modelopt.torch.quantization.qtensor`) and of NVFP4
checkpoints; the documentation of compressed-tensors, formats `nvfp4-pack-quantized`, `mxfp4-pack-quantized` and
`float-quantized`, whose factor is the reciprocal one. torchao's `NVFP4Tensor` is in `torchao.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.storage import Payload
from .codes import E4M3, E8M0, exponents
from .scaled import Scaled, place

ROOM = 448.0 * 6.0  # the largest scale of a block times the largest code


class Packed4(Scaled):
    """Codes of E2M1 or E4M3 in a linear layer."""

    def widened(self, value: Tensor, payload: Payload) -> Payload:
        over, largest = payload.get("over"), value.abs().amax() / ROOM
        if over is None or largest <= over.max():
            return payload
        return self.factored({**payload, "over": largest.expand(over.shape).to(over.dtype)})

    def factored(self, payload: Payload) -> Payload:
        """A payload with a new factor in "over", as the library writes that factor."""
        return payload

    def sample(self, module: nn.Module, name: str) -> Any:
        held = module._parameters.get(name)
        return held if held is not None else module._parameters.get(f"{name}_packed")

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        m: Any = module
        return (m.out_features, m.in_features)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return torch.float32


class ModelOpt(Packed4):
    """`RealQuantLinear`, what `compress` of ModelOpt makes: the scales lie in its `weight_quantizer`."""

    names = ("modelopt.torch.quantization.nn.modules.quant_linear.RealQuantLinear",)
    label = "modelopt"

    def holds(self, module: nn.Module, name: str) -> bool:
        return type(getattr(module, name, None)).__name__ == "QTensorWrapper"

    def take(self, module: nn.Module, name: str) -> Payload:
        weight: Any = getattr(module, name)
        form, held = weight.metadata["qtensor_class"].__name__, module.get_submodule(f"{name}_quantizer")._buffers
        codes, scale = weight.data, held.get("_scale")
        if scale is None or form not in ("NVFP4QTensor", "MXFP4QTensor", "FP8QTensor"):
            raise _unread(module, name, form)
        if form == "MXFP4QTensor":
            scale = exponents(scale.view(codes.shape[0], -1))
        sizes = {"NVFP4QTensor": (1, 16), "MXFP4QTensor": (1, 32)}.get(form)
        return {"codes": codes, "scale": scale, "over": held.get("_double_scale"), "sizes": sizes}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        held = module.get_submodule(f"{name}_quantizer")
        getattr(module, name).data = payload["codes"]
        for key, value in (("_scale", payload["scale"]), ("_double_scale", payload["over"])):
            old = held._buffers.get(key)
            if old is not None:
                value = value.view(torch.uint8) if value.dtype == E8M0 else value
                place(held, key, value.reshape(old.shape))


class Compressed(Packed4):
    """`CompressedLinear`, until its first call makes numbers of it for good."""

    names = ("compressed_tensors.linear.compressed_linear.CompressedLinear",)
    label = "compressed-tensors"
    beside = ("_packed", "_scale", "_global_scale", "_zero_point", "_shape", "_g_idx")

    def holds(self, module: nn.Module, name: str) -> bool:
        held = module._parameters.get(name)
        return f"{name}_packed" in module._parameters or (held is not None and held.dtype.itemsize == 1)

    def take(self, module: nn.Module, name: str) -> Payload:
        held = module._parameters
        packed, scale, whole = (held.get(f"{name}_{key}") for key in ("packed", "scale", "global_scale"))
        codes = held.get(name) if packed is None else packed
        if codes is None or scale is None or not _readable(codes, scale, packed is not None):
            raise _unread(module, name, str(getattr(codes, "dtype", None)))
        blocks: Tensor = exponents(scale.detach()) if scale.dtype == torch.uint8 else scale.detach()
        sizes = None if packed is None else (1, 16 if scale.dtype == E4M3 else 32)
        payload: Payload = {"codes": codes.detach(), "scale": blocks, "sizes": sizes, "over": None, "whole": None}
        if whole is not None:
            payload.update(over=1 / whole.detach(), whole=whole.detach())
        return payload

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        packed, scale = f"{name}_packed" in module._parameters, payload["scale"]
        place(module, f"{name}_packed" if packed else name, payload["codes"])
        place(module, f"{name}_scale", scale.view(torch.uint8) if scale.dtype == E8M0 else scale)
        if payload["whole"] is not None:
            place(module, f"{name}_global_scale", payload["whole"])

    def factored(self, payload: Payload) -> Payload:
        whole = 1 / payload["over"]
        return {**payload, "whole": whole, "over": 1 / whole}


def _readable(codes: Tensor, scale: Tensor, packed: bool) -> bool:
    """Whether these are E2M1 with scales of E4M3 or powers of two, or E4M3."""
    if packed:
        return codes.dtype == torch.uint8 and scale.dtype in (E4M3, torch.uint8)
    return codes.dtype == E4M3


def _unread(module: nn.Module, name: str, form: str) -> NotImplementedError:
    return NotImplementedError(
        f"The {name} of this {type(module).__name__} is in a form ({form}) that cannot be read as numbers here; "
        "NVFP4, MXFP4 and FP8 can. Keep the adapter unmerged, or load the base model in a floating-point dtype and "
        "merge there."
    )
