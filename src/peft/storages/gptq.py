"""GPTQ: groups of inputs with a scale and a zero each, possibly in an order of their own.

`qweight` (I * bits / 32, O) holds integers along the inputs, `qzeros` (G, O * bits / 32) along the outputs, both from
the lowest bits of int32 words on, three-bit numbers running over into the next word; `scales` (G, O); `g_idx` (I,), the
group of each input. The first format, v1, stores each zero less one; v2 stores it as it is. auto-gptq computes with v1;
the classes of gptqmodel say themselves with which, and turn v1 into v2 when a file is loaded.
Sources: Frantar et al. 2022, arXiv 2210.17323; the names of the formats are GPTQModel's (`checkpoint_format`), and what
they mean was checked against what its layers and auto-gptq's compute.
"""

from __future__ import annotations

from typing import Any

import torch

from .affine import Affine, Form

_AUTO, _MODEL = "auto_gptq.nn_modules.qlinear", "gptqmodel.nn_modules.qlinear"
# whose tensors stay as the file has them; other kernels reorder theirs
AUTO = tuple(f"{_AUTO}.qlinear_{kernel}.QuantLinear" for kernel in ("cuda", "cuda_old", "triton", "tritonv2"))
MODEL = tuple(
    f"{_MODEL}.{kernel}Linear"
    for kernel in ("torch.Torch", "torch.TorchQuant", "tritonv2.TritonV2", "tritonv2.TritonV2Quant")
)
BITS = (2, 3, 4, 8)


class GPTQ(Affine):
    """Layers of auto-gptq and gptqmodel."""

    names = (*AUTO, *MODEL, f"{_AUTO}.*.QuantLinear", f"{_MODEL}.*Linear")
    label = "gptq"

    def form(self, module: Any) -> Form | None:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        second = getattr(module, "REQUIRES_FORMAT_V2", name not in AUTO)
        bits, words = getattr(module, "bits", None), getattr(module, "qweight", None)
        stated = name in AUTO or hasattr(module, "REQUIRES_FORMAT_V2")
        if name not in AUTO + MODEL or not stated or bits not in BITS or not isinstance(words, torch.Tensor):
            return None
        if getattr(module, "planar", False):
            return None
        O, I = shape = self.shape(module, "weight")
        form = Form(
            shape,
            bits,
            add=0 if second else 1,
            wraps=not second and bits != 3,
            group=getattr(module, "group_size", 0) if getattr(module, "group_size", 0) > 0 else 0,
        )
        width = 8 * words.dtype.itemsize
        fits = words.shape[1] == O and words.shape[0] * width >= I * bits and not words.is_floating_point()
        return form if fits and module.qzeros.shape[0] == module.scales.shape[0] else None


class Embeddings(Affine):
    """gptqmodel's embedding, a subclass of its linear layer: its product is none with a matrix of this shape."""

    names = (f"{_MODEL}.torch.TorchQuantEmbeddings",)
    weights = ()
    label = "gptq"
