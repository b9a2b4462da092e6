"""FP8: weights of E4M3 codes with scales of tensors, rows or blocks of 128 x 128, as classes of transformers hold them.

Sources: transformers' documentation of fine-grained FP8, FBGEMM FP8 and compressed-tensors; the DeepSeek-V3 technical
report, arXiv 2412.19437, for the blocks. Experts may also hold E2M1 codes, two in an int8, with a scale for each 32.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.storage import Payload
from .experts import Experts
from .scaled import Scaled, aside, place

_HERE = "transformers.integrations"


class FP8(Scaled):
    """`FP8Linear` and its like: the scale lies beside the weight, under a name that the class decides."""

    names = (
        f"{_HERE}.finegrained_fp8.FP8Linear",
        f"{_HERE}.finegrained_fp8.FP8Embedding",
        f"{_HERE}.fbgemm_fp8.FbgemmFp8Linear",
        f"{_HERE}.compressed_tensors.CompressedTensorsFP8Linear",
    )
    label = "fp8"
    beside = ("_scale_inv", "_scale")

    def holds(self, module: nn.Module, name: str) -> bool:
        return getattr(module, name).dtype.itemsize == 1

    def take(self, module: nn.Module, name: str) -> Payload:
        codes, scale = getattr(module, name).detach(), getattr(module, _scale(module, name)).detach()
        if scale.dim() == 2 and scale.shape == (1, codes.shape[0]) and hasattr(module, "in_features"):
            scale = scale.mT  # compressed-tensors' rows lie the other way round
        return {"codes": codes, "scale": scale, "sizes": getattr(module, "block_size", None)}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        where = _scale(module, name)
        place(module, name, payload["codes"])
        place(module, where, payload["scale"].reshape(getattr(module, where).shape))


class FP8Experts(Experts):
    """`FP8Experts`: stacks of weights with stacks of scales."""

    names = (f"{_HERE}.finegrained_fp8.FP8Experts",)
    label = "fp8"
    beside = ("_scale_inv", "_activation_scale")

    def take(self, module: nn.Module, name: str) -> Payload:
        codes = getattr(module, name).detach()
        if codes.dtype.itemsize > 1:
            return {"dense": codes}
        sizes = getattr(module, "block_size", None) if codes.is_floating_point() else None
        return {"codes": codes, "scale": aside(getattr(module, _scale(module, name))), "sizes": sizes}

    def lay(self, module: nn.Module, name: str, payload: Payload) -> None:
        place(module, name, payload.get("dense", payload.get("codes")))
        place(module, f"{name}_scale_inv", payload.get("scale"))

    def gated(self, module: Any, h: Tensor) -> Tensor:
        return module._apply_gate(h) if getattr(module, "has_gate", True) else module.act_fn(h)


def _scale(module: nn.Module, name: str) -> str:
    inverse = f"{name}_scale_inv"
    return inverse if hasattr(module, inverse) else f"{name}_scale"
