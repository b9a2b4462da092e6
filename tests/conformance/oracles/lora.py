"""LoRA, DoRA and the initialisations that the literature subtracts from the base weight."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft import LoraConfig
from peft.core.layer import BaseTunerLayer
from peft.methods.lora.method import OutProjection

from ..layouts import Layout
from .row import Row, directed

SUBTRACTING = ("pissa", "pissa-niter", "olora")  # their first B A is taken out of the base weight


def scaling(layer: BaseTunerLayer, name: str) -> float:
    return 6 / math.sqrt(4) if layer.use_rslora[name] else 6 / 4


def factors(layer: BaseTunerLayer, name: str) -> tuple[Tensor, Tensor]:
    """A and B as the layer holds them."""
    if "lora_embedding_A" in layer._modules:
        return layer.lora_embedding_A[name].double(), layer.lora_embedding_B[name].double()
    return layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()


def update(layer: BaseTunerLayer, name: str, subtract: bool) -> Tensor:
    """What is added to W, in the stored layout; on a convolution with groups it is a kernel without them."""
    D = product(layer, *factors(layer, name))
    if subtract:
        A0, B0 = (next(v for k, v in layer.first[name].items() if f"{e}.{name}" in k).double() for e in ("A", "B"))
        D = D - product(layer, A0, B0)
    D = scaling(layer, name) * D
    if isinstance(layer.adapters[name].method, OutProjection):
        D = D + D.detach()  # the update is added twice, the second time without gradient
    return D


def lora(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor, subtract: bool = False) -> Tensor:
    """W + s B A, less the first product if that is to be subtracted."""
    base: Any = layer.get_base_layer()
    return (ungrouped(base, W) if getattr(base, "groups", 1) != 1 else W) + update(layer, name, subtract)


def lora_bias(layer: BaseTunerLayer, name: str, b: Tensor | None) -> Tensor | None:
    beside = getattr(layer, "lora_embedding_bias", None)  # an embedding's factors are parameters, without room for it
    extra = layer.lora_B[name].bias if beside is None else beside[name]
    return (0 if b is None else b) + scaling(layer, name) * extra.double()


def dora(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    """m V / |V|, V being of this adapter; |V| is that of the original weight, whatever other adapters made of W."""
    D, base = update(layer, name, False), layer.get_base_layer()
    if getattr(base, "groups", 1) == 1:
        return directed(layer, name, W + D, original + D)
    # what adapter files were trained for: B's compact blocks read as a matrix of r columns
    A, B = factors(layer, name)
    compact = B.flatten(1).reshape(-1, A.shape[0]) @ A.flatten(1)
    norm_of = original + scaling(layer, name) * compact.reshape(original.shape)
    return directed(layer, name, ungrouped(base, W) + D, norm_of)


def product(layer: BaseTunerLayer, A: Tensor, B: Tensor) -> Tensor:
    """B A in the stored layout of the layer's weight."""
    base: Any = layer.get_base_layer()
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        g, flat = base.groups, B.flatten(1)
        out, rank = flat.shape[0] // g, flat.shape[1]
        parts = [flat[i * out : (i + 1) * out] @ A[i * rank : (i + 1) * rank].flatten(1) for i in range(g)]
        return torch.cat(parts).unflatten(1, A.shape[1:])
    if isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D":
        return (B @ A).mT
    if layer.parameter_name is None or getattr(base, layer.parameter_name).dim() == 2:
        return B @ A
    E = getattr(base, layer.parameter_name).shape[0]
    r = A.shape[0] // E
    D = torch.stack([B[:, e::E] @ A[e * r : (e + 1) * r] for e in range(E)])
    return D.mT if base.is_transposed else D


def ungrouped(m: Any, W: Tensor) -> Tensor:
    """The kernel without groups that equals a grouped one; one without groups already is left as it is."""
    if W.shape[1] == m.in_channels:
        return W
    out, inp = W.shape[0] // m.groups, W.shape[1]
    full = W.new_zeros(W.shape[0], m.in_channels, *W.shape[2:])
    for i in range(m.groups):
        full[i * out : (i + 1) * out, i * inp : (i + 1) * inp] = W[i * out : (i + 1) * out]
    return full


def no_groups(layout: Layout) -> str | None:
    return "groups" if layout.grouped else None


def no_bias(layout: Layout) -> str | None:
    return "lora_bias" if layout.kind == "parameter" or "separate" in layout.name else None


def row(weight: Any = lora, **more: Any) -> Row:
    known = {k: more.pop(k) for k in ("bias", "forbidden", "few", "identity") if k in more}
    return Row(LoraConfig, {"r": 4, "lora_alpha": 6, **more}, weight, grouped=False, **known)


minus = partial(lora, subtract=True)
ROWS = {
    "lora": row(),
    "rslora": row(use_rslora=True, few=False),
    "lora-bias": row(lora_bias=True, bias=lora_bias, forbidden=no_bias),
    "dora": row(dora, use_dora=True),
    "dora-bias": row(dora, use_dora=True, lora_bias=True, bias=lora_bias, forbidden=no_bias, few=False),
    "pissa": row(minus, init_lora_weights="pissa", forbidden=no_groups),
    "pissa-niter": row(minus, init_lora_weights="pissa_niter_4", forbidden=no_groups, few=False),
    "olora": row(minus, init_lora_weights="olora", forbidden=no_groups, few=False),
    "orthogonal": row(init_lora_weights="orthogonal", forbidden=no_groups, few=False),
}
