"""VeLoRA: what a layer keeps of its input for A's gradient is one number for a group of features.

    x cut into g groups of m features:  c = x_group . v,   and for the gradient of A:  x_group ~ scale c v

The forward is LoRA's, and the gradients of x and B are exact. v (m) is the mean group, normalised, of every batch or of
the first, or random. The features of a convolution are its channels, at every place. Where a layer keeps nothing of an
input that could be compressed, this is plain LoRA, with exact gradients: an embedding keeps the numbers of tokens, and
attention and parameters read W' themselves. Source: Miles et al. 2024, arXiv 2405.17991, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.method import Site
from ...core.stack import Adapter, Stack
from ...kernels.lowrank import compressed, compressed_by, groups
from .method import InTraining


class VeLoRA(InTraining):
    """LoRA with a compressed input in the backward pass."""

    def build(self, site: Site) -> dict[str, Any]:
        built = super().build(site)
        if not site.view.activations or site.view.one_hot:
            return built
        n = site.settings.velora_config.num_groups
        v = nn.Buffer(torch.zeros(-(-site.view.inputs(site.module) // n), **site.kwargs))
        return {**built, "lora_velora_embed": v, "groups": n}

    def init(self, p: Adapter, inner: Stack) -> None:
        super().init(p, inner)
        if p.settings.velora_config.init_type == "random" and p.has("lora_velora_embed"):
            v = p.lora_velora_embed
            v.copy_(F.normalize(torch.randn_like(v), dim=0))

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if not (p.layer.training and torch.is_grad_enabled() and x.is_floating_point()):
            return super().onto(p, inner, y, x)
        A, B = self.own_factors(p)
        x = F.dropout(x.to(A.dtype), self.drop_rate(p))
        axis = -inner.spread(B.new_empty(1)).dim()  # of the features
        v, scale = p.held("lora_velora_embed"), p.settings.velora_config.scale
        self._follow(p, groups(x.detach(), axis, len(v)).flatten(0, -2))
        if inner.view.dense:
            h = compressed(x.reshape(-1, x.shape[-1]), A, v.clone(), scale).view(*x.shape[:-1], A.shape[0])
        else:
            h = compressed_by(inner.linear, x, axis, A, v.clone(), scale)
        update = inner.view.rows(h, B)
        if p.subtracts:
            A0, B0 = self.first_factors(p)
            update = update - inner.low_rank(x, A0.to(x.dtype), B0.to(x.dtype))
        update = update * p.scaling
        extra = self.up_bias(p)
        return (y + (update if extra is None else update + inner.spread(extra) * p.scaling)).to(y.dtype)

    @torch.no_grad()
    def _follow(self, p: Adapter, x: Tensor) -> None:
        """The mean group of the batch, of x (groups, m), as the direction, if it is to follow the batches."""
        v, kind = p.held("lora_velora_embed"), p.settings.velora_config.init_type
        if kind == "random" or not len(x):
            return
        mean = x.mean(0)
        new = F.normalize(torch.where(mean.any(), mean, 1.0), dim=0)
        v.copy_(torch.where(v.any(), v, new) if kind == "batch_average_once" else new)
