"""Intel Neural Compressor's weight-only layers: integers of 2 to 8 bits in groups of inputs.

With `use_optimum_format` they lie as GPTQ's v1, `qweight` along the inputs and `qzeros` along the outputs, each zero
less one. Else `scales` are (O, G), and `compression_dim` is the axis of (O, I) and (O, G) along which integers are
packed; a layer without zeros holds integers with a sign. A word holds as many whole numbers as it has room for.
Source: the documentation of `INCWeightOnlyLinear`, its arguments and its `use_optimum_format`. Eight-bit zeros leave
the range of the type that the library computes with, so that such a layer is read by its own `recover`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.storage import Payload
from .affine import Affine, Form

_HERE = "neural_compressor.torch.algorithms.weight_only.modules"
INC_LINEAR = f"{_HERE}.INCWeightOnlyLinear"
_OLDER = "neural_compressor.adaptor.torch_utils.model_wrapper.WeightOnlyLinear"


class INC(Affine):
    """`INCWeightOnlyLinear`; others of the family are read through their product."""

    names = (INC_LINEAR, f"{_HERE}.*WeightOnlyLinear", _OLDER)
    label = "inc"
    checks = False  # its first call would keep a dense copy, in the dtype of that call

    def form(self, module: Any) -> Form | None:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        words, bits = getattr(module, "qweight", None), getattr(module, "bits", 0)
        scales, zeros = getattr(module, "scales", None), getattr(module, "qzeros", None)
        if name != INC_LINEAR or "int" not in str(getattr(module, "dtype", "")) or words is None or scales is None:
            return None
        shape, size = self.shape(module, "weight"), module.group_size
        size = size if size > 0 else shape[1]
        if module.use_optimum_format:
            usual = bool(bits != 8 or _even(zeros, bits))
            return Form(shape, bits, tight=False, add=1, wraps=True, group=size) if usual else None
        if bits == 8 and zeros is not None:
            return None
        axis = module.compression_dim
        return Form(shape, bits, "out", axis, axis, tight=False, signed=zeros is None, group=size)

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        super().put(module, name, payload)
        module.__dict__.pop("weight", None)  # the dense copy that the module's first call has kept

    def unpack(self, payload: Payload) -> Tensor:
        recover = None if "form" in payload else getattr(payload["module"], "recover", None)
        return super().unpack(payload) if recover is None else recover().contiguous()


def _even(zeros: Any, bits: int) -> bool:
    """Whether all zeros of whole bytes are the middle of their range, stored less one."""
    return zeros.is_meta or bool((zeros.contiguous().view(torch.uint8) == 2 ** (bits - 1) - 1).all())
