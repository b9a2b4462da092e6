"""AWQ: four-bit integers in groups of inputs, with a scale and a zero each; zeros are stored as they are.

GEMM: `qweight` (I, O / 8) holds eight outputs in an int32, at its places 0 to 7 those with the numbers 0, 2, 4, 6, 1,
3, 5, 7; `qzeros` (G, O / 8) likewise; `scales` (G, O). GEMV: `qweight` (O, I / 8) holds eight inputs in their order,
`qzeros` (O, G / 8) eight groups, `scales` (O, G), both filled up with zeros to a width that the kernel likes.
Sources: Lin et al. 2023, arXiv 2306.00978; AutoAWQ's documentation and its discussion of the two formats.
"""

from __future__ import annotations

from typing import Any

from .affine import Affine, Form

_AUTO, _MODEL = "awq.modules.linear", "gptqmodel.nn_modules.qlinear"
GEMM = (
    f"{_AUTO}.gemm.WQLinear_GEMM",
    f"{_MODEL}.torch_awq.AwqTorchLinear",
    f"{_MODEL}.torch_awq.AwqTorchQuantLinear",
    f"{_MODEL}.gemm_awq.AwqGEMMLinear",
    f"{_MODEL}.gemm_awq.AwqGEMMQuantLinear",
)
GEMV = (f"{_AUTO}.gemv.WQLinear_GEMV",)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FEW = 4  # bits, of which both formats know no others


class AWQ(Affine):
    """Layers of AutoAWQ, and of gptqmodel which has taken its place."""

    names = (*GEMM, *GEMV, f"{_AUTO}.*.WQLinear_*", f"{_MODEL}.*Awq*Linear", f"{_MODEL}.*AWQ*Linear")
    label = "awq"

    def form(self, module: Any) -> Form | None:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        if getattr(module, "w_bit", getattr(module, "bits", None)) != FEW or name not in GEMM + GEMV:
            return None
        O, I = shape = self.shape(module, "weight")
        size = module.group_size if module.group_size > 0 else I
        words, zeros = tuple(module.qweight.shape), tuple(module.qzeros.shape)
        if name in GEMM:
            form = Form(shape, FEW, codes=1, zeros=1, order=ORDER, group=size)
            return form if words == (I, O // 8) and zeros == (I // size, O // 8) else None
        form = Form(shape, FEW, first="out", codes=1, zeros=1, group=size)
        return form if words == (O, I // 8) and zeros[0] == O and zeros[1] * 8 * size >= I else None
