"""BEFT: what is learnt is added to the biases, and nothing else.

    W' = W,   b' = b + beta;   beta starts at zero

A layer without a bias gets one, which only a merge cannot hold; an embedding's merge can, as each input is one token:
it goes into every row. Source: Huang et al. 2025, arXiv 2509.15974. Different from the peer: convolutions, embeddings
and attention, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import describe
from ..core.direct import open_linear
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Method, Site
from ..core.stack import Adapter, Stack
from ..core.tuner import BaseTuner
from ..target_config import TargetConfig


@dataclass
class BeftConfig(TargetConfig):
    """The configuration of BEFT."""

    kind = "BEFT"
    added = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "bias"})
    ranks = ()
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))


class BEFT(Method):
    """b' = b + beta."""

    additive = True
    linear: ClassVar[dict[str, float]] = {"beft_bias": 0.0}

    def build(self, site: Site) -> dict[str, Any]:
        *lead, out, _ = site.view.shape(site.module)
        if not site.view.bias_name:
            raise ValueError(f"{site.path!r} has no bias, nor room for one. Leave it out (`exclude_modules`).")
        return {"beft_bias": nn.Parameter(torch.zeros(*(lead or [1]), out, **site.kwargs))}

    def init(self, p: Adapter, inner: Stack) -> None:
        if not p.settings.init_weights:
            p.beft_bias.normal_()

    def bias(self, p: Adapter, b: Tensor | None) -> Tensor | None:
        extra = p.held("beft_bias")
        extra = extra[0] if len(extra) == 1 else extra
        if b is not None:
            return (b + extra).to(b.dtype)
        weight = p.layer.view.sample(p.layer.get_base_layer())  # attention wants a bias of its weight's dtype
        return extra.to(weight.dtype) if weight is not None and weight.is_floating_point() else extra

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        held, extra = open_linear(inner, x), p.held("beft_bias")
        if held is None or extra.dtype is not x.dtype:
            y = inner(x)
            return (y + inner.spread(extra.flatten())).to(y.dtype)
        W, b = held
        return F.linear(x, W, extra[0] if b is None else b + extra[0])


class BeftLayer(BaseTunerLayer):
    """A target under BEFT adapters."""

    family = "beft"
    _bare = True
    adapter_layer_names = ("beft_bias",)
    _parameter_homes = frozenset({"beft_bias"})


class BeftModel(BaseTuner):
    """BEFT adapters on a model."""

    prefix = "beft_"
    layer_classes = name_layers(BeftLayer, globals())
    method: ClassVar[BEFT] = BEFT()
