"""VeLoRA: what a layer keeps of its input for A's gradient is one number for a group of features.

    x cut into g groups of m features:  c = x_group . v,   and for the gradient of A:  x_group ~ scale c v

The forward is LoRA's, and the gradients of x and B are exact. v (m) is the mean group, normalised, of every batch or of
the first, or random. Source: Miles et al. 2024, arXiv 2405.17991, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.method import Site
from ...core.stack import Adapter, Stack
from ...kernels.lowrank import compressed
from .method import InTraining


class VeLoRA(InTraining):
    """LoRA with a compressed input in the backward pass."""

    def build(self, site: Site) -> dict[str, Any]:
        if not site.view.dense:
            raise ValueError(
                f"velora_config compresses the input of linear layers, but {site.path!r} is a {site.view.label}. Leave "
                "it out (`exclude_modules`), or give it module_config={...: {'velora_config': None}}."
            )
        groups = site.settings.velora_config.num_groups
        size = -(-site.view.shape(site.module)[-1] // groups)
        v = nn.Buffer(torch.zeros(size, **site.kwargs))
        return {**super().build(site), "lora_velora_embed": v, "groups": groups}

    def init(self, p: Adapter, inner: Stack) -> None:
        super().init(p, inner)
        if p.settings.velora_config.init_type == "random":
            v = p.lora_velora_embed
            v.copy_(F.normalize(torch.randn_like(v), dim=0))

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if not (p.layer.training and torch.is_grad_enabled()):
            return super().onto(p, inner, y, x)
        A, B = self.factors(p)
        x = F.dropout(x.to(A.dtype), self.drop_rate(p))
        flat = x.reshape(-1, x.shape[-1])
        self._follow(p, flat.detach())
        h = compressed(flat, A, p.held("lora_velora_embed").clone(), p.settings.velora_config.scale)
        update = F.linear(h, B).view(y.shape) * p.scaling
        extra = self.up_bias(p)
        return (y + (update if extra is None else update + extra * p.scaling)).to(y.dtype)

    @torch.no_grad()
    def _follow(self, p: Adapter, x: Tensor) -> None:
        """The mean group of the batch as the direction, if it is to follow the batches."""
        v, kind = p.held("lora_velora_embed"), p.settings.velora_config.init_type
        if kind == "random" or not len(x):
            return
        mean = F.pad(x, (0, p.groups * len(v) - x.shape[1])).view(-1, len(v)).mean(0)
        new = F.normalize(torch.where(mean.any(), mean, 1.0), dim=0)
        v.copy_(torch.where(v.any(), v, new) if kind == "batch_average_once" else new)
