"""MXFP4: E2M1 codes in blocks of 32 with a power of two each, as the fused experts of gpt-oss hold them.

Source: OCP Microscaling Formats Specification 1.0; the gpt-oss model card and checkpoints for the layout: blocks
(experts, out, groups, 16) with two codes in a byte, the first in its low half, and scales (experts, out, groups).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.storage import Payload
from .codes import exponents
from .experts import Experts
from .scaled import place


class MXFP4Experts(Experts):
    """`Mxfp4GptOssExperts` with the tensors of its checkpoint.

    Once the library's kernel has reordered them for a graphics card they cannot be read back.
    """

    names = ("transformers.integrations.mxfp4.Mxfp4GptOssExperts",)
    weights = ("gate_up_proj", "down_proj")
    label = "mxfp4"
    beside = ("_blocks", "_scales")

    def holds(self, module: nn.Module, name: str) -> bool:
        held = getattr(module, name, None)
        return hasattr(module, f"{name}_blocks") or _reordered(module, name) or held is not None

    def take(self, module: nn.Module, name: str) -> Payload:
        blocks, held = getattr(module, f"{name}_blocks", None), module._parameters.get(name)
        if blocks is None and held is not None and held.is_floating_point():
            return {"dense": held.detach()}
        if blocks is None:
            raise NotImplementedError(
                f"The {name} of {type(module).__name__} is laid out for its kernel, or not loaded yet, and cannot be "
                "read as numbers. Load the model with Mxfp4Config(dequantize=True) to train or merge an adapter on it."
            )
        codes = blocks.detach().flatten(-2)
        scale = getattr(module, f"{name}_scales").detach()
        return {"codes": codes, "scale": exponents(scale), "sizes": (1, 1, 32), "spare": held}

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        m: Any = module
        rows = 2 * m.intermediate_size if name == "gate_up_proj" else m.hidden_size
        return (m.num_experts, rows, m.hidden_size if name == "gate_up_proj" else m.intermediate_size)

    def lay(self, module: nn.Module, name: str, payload: Payload) -> None:
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        if "dense" in payload:
            for gone in (blocks, scales):
                module._parameters.pop(gone, None)
                module._buffers.pop(gone, None)
            place(module, name, payload["dense"])
            return
        place(module, blocks, payload["codes"].unflatten(-1, (-1, 16)))
        place(module, scales, payload["scale"].view(torch.uint8))
        place(module, name, payload["spare"])

    def gated(self, module: Any, h: Tensor) -> Tensor:
        gate, up = h[..., ::2].clamp(max=module.limit), h[..., 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)


def _reordered(module: nn.Module, name: str) -> bool:
    return getattr(module, f"{name}_precision_config", None) is not None
