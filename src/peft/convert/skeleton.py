"""Models of nothing but names and shapes, for adapters whose tensors tell all of their update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .part import ConversionError, Layer, Part


class Skeleton(nn.Module):
    """Layers where an adapter has tensors, with weights of zeros that take no memory.

    Arguments:
        part: a LoRA, LoHa or LoKr adapter, whose update its own tensors tell.
    """

    def __init__(self, part: Part):
        super().__init__()
        for layer in part.split()[0]:
            *above, last = layer.path.split(".")
            home: Any = self
            for name in above:
                if name not in home._modules:
                    home.add_module(name, nn.Module())
                home = home._modules[name]
            home.add_module(last, _layer(layer))


def _layer(layer: Layer) -> nn.Module:
    t = layer.tensors
    if "lora_A.weight" in t or layer.infix:
        A, B = layer.factor("A"), layer.factor("B")
        if layer.infix:
            m = nn.Embedding(1, 1, device="meta")
            m.num_embeddings, m.embedding_dim = A.shape[1], B.shape[0]
            return _empty(m, (A.shape[1], B.shape[0]))
        if A.dim() > 2:
            return _conv(A, B, layer.path)
        return _linear(B.shape[0], A.shape[1])
    if any(x.dim() > 2 for x in t.values()):
        raise ConversionError(f"{layer.path!r} is a convolution, whose kernel the file does not tell. Give `base`.")
    if "hada_w1_a" in t:
        return _linear(t["hada_w1_a"].shape[0], t["hada_w1_b"].shape[1])
    O, I = (_lokr_size(t, "lokr_w1", axis) * _lokr_size(t, "lokr_w2", axis) for axis in (0, 1))
    return _linear(O, I)


def _lokr_size(t: dict[str, Tensor], name: str, axis: int) -> int:
    whole = t.get(name)
    return whole.shape[axis] if whole is not None else t[f"{name}_{'ab'[axis]}"].shape[axis]


def _linear(O: int, I: int) -> nn.Module:
    m = nn.Linear(1, 1, bias=False, device="meta")
    m.in_features, m.out_features = I, O
    return _empty(m, (O, I))


def _conv(A: Tensor, B: Tensor, path: str) -> nn.Module:
    kernel, groups = tuple(A.shape[2:]), A.shape[0] // B.shape[1]
    if groups != 1:
        raise ConversionError(f"{path!r} is a convolution in groups, which the file does not tell all of. Give `base`.")
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    m = kind(A.shape[1], B.shape[0], kernel, bias=False, device="meta")
    return _empty(m, (B.shape[0], A.shape[1], *kernel))


def _empty(m: Any, shape: tuple[int, ...]) -> nn.Module:
    """The module with a weight of zeros that are one number in memory."""
    m.weight = nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu").expand(shape), requires_grad=False)
    return m
