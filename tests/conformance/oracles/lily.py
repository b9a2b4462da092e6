"""Lily, expert by expert; the mixture is that of the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft import LilyConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .row import Row, on_matrix

R, EXPERTS, SCALING = 3, 3, 1.5


def features(layer: Any, x: Tensor, A: Tensor) -> Tensor:
    """A x at each position (of each group of a convolution), (positions, r)."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        scale = base.embed_scale.item() if hasattr(base, "embed_scale") else 1.0
        return scale * F.embedding(x, A.mT, base.padding_idx).flatten(0, -2)
    if not hasattr(base, "kernel_size"):
        return x.double().reshape(-1, x.shape[-1]) @ A.mT
    g, kernel = base.groups, base.kernel_size
    conv = type(base)(
        base.in_channels, g * R, kernel, base.stride, base.padding, base.dilation, g, False, base.padding_mode
    ).double()
    weight = torch.cat([A.unflatten(1, (-1, *kernel))] * g)
    h = torch.func.functional_call(conv, {"weight": weight}, (x.double(),))
    return h.movedim(-1 - len(kernel), -1).reshape(-1, R)


def of_input(x: Tensor) -> Any:
    @on_matrix
    def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
        A, experts = t["lily_A.weight"], t["lily_B.weight"].split(R)
        p = (features(layer, x, A) @ t["lily_router.weight"].mT).softmax(-1).mean(0)
        return W + SCALING * sum(p[e] * experts[e] for e in range(EXPERTS)).mT @ A

    return weight


def reads(layout: Layout) -> str | None:
    return "reads the weight" if layout.kind in ("attention", "parameter") else None


FIELDS = {"r": R, "num_B": EXPERTS, "scaling": SCALING}
ROWS = {
    "lily": Row(
        LilyConfig, FIELDS, of_input(torch.empty(0)), forbidden=reads, prefix="lily_", merges=False, of_input=of_input
    )
}
