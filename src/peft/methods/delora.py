"""DeLoRA: a low-rank update whose directions are of length one and whose strength is a number of its own.

    W' = W + (lambda / r) sum_k  b_k a_k' / (|a_k| |b_k|) diag(w),   w_j = |W_j|, the norm of in-feature j's column

a_k are the rows of A and b_k the columns of B. B starts at zero, whose length is taken as 1e-4 at least, so training
starts at the base model. w is that of the base weight at creation, and saved. Source: Bini et al. 2025, arXiv
2503.18225, eq. 7.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.draw import kaiming
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import LowRank, Site
from ..core.stack import Adapter, Stack
from ..target_config import choice, number, probability, rank
from .additive import AdditiveConfig, AdditiveModel

SHORTEST = 1e-4


@dataclass
class DeloraConfig(AdditiveConfig):
    """The configuration of DeLoRA."""

    kind = "DELORA"
    r: int = field(default=8, metadata=describe("Rank of the factors."))
    delora_lambda: int = field(default=15, metadata=describe("The strength at the start."))
    module_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of the update."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))
    rank_pattern: dict | None = field(
        default_factory=dict, metadata=describe("Ranks that differ: {regular expression of the name or its end: rank}.")
    )
    lambda_pattern: dict | None = field(
        default_factory=dict, metadata=describe("Strengths that differ, written as `rank_pattern`.")
    )

    def check(self) -> None:
        """Numbers are in their ranges."""
        number("delora_lambda", self.delora_lambda)
        probability("module_dropout", self.module_dropout)
        choice("init_weights", self.init_weights, (True, False))
        for pattern, r in (self.rank_pattern or {}).items():
            rank(f"rank_pattern[{pattern!r}]", r)
        for pattern, strength in (self.lambda_pattern or {}).items():
            number(f"lambda_pattern[{pattern!r}]", strength)


class DeLoRA(LowRank):
    """W' = W + B A with normed factors."""

    dropout = "delora_dropout"

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        return {
            "delora_dropout": site.dropout("module_dropout"),
            "delora_A": nn.Parameter(torch.empty(*lead, c.r, inp, **site.kwargs)),
            "delora_B": nn.Parameter(torch.empty(*lead, out, c.r, **site.kwargs)),
            "delora_lambda": nn.Parameter(torch.empty(*lead, 1, **site.kwargs)),
            "delora_w_norm": nn.Buffer(torch.ones(*lead, inp, **site.kwargs)),
            "r": c.r,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        kaiming(p.delora_A)
        p.delora_lambda.fill_(p.settings.delora_lambda)
        if p.settings.init_weights:
            p.delora_B.zero_()
        else:
            kaiming(p.delora_B)

    def derive(self, p: Adapter, inner: Stack) -> None:
        if p.delora_w_norm.device.type != "meta":
            p.delora_w_norm.copy_(torch.linalg.vector_norm(p.original_weight(), dim=-2, dtype=p.delora_w_norm.dtype))

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        A, B = p.held("delora_A"), p.held("delora_B")
        strength = p.held("delora_lambda")[..., None] / p.r
        A = A / _length(A, -1) * p.held_buffer("delora_w_norm")[..., None, :]
        return A, B / _length(B, -2) * strength


def _length(t: Tensor, axis: int) -> Tensor:
    return torch.linalg.vector_norm(t, dim=axis, keepdim=True).clamp_min(SHORTEST)


class DeloraLayer(BaseTunerLayer):
    """A target under DeLoRA adapters."""

    family = "delora"
    adapter_layer_names = ("delora_A", "delora_B", "delora_lambda")
    other_param_names = ("r", "delora_dropout", "delora_w_norm")
    _home_order = ("delora_dropout", "delora_A", "delora_B", "delora_lambda")
    _parameter_homes = frozenset({"delora_A", "delora_B", "delora_lambda"})


class DeloraModel(AdditiveModel):
    """DeLoRA adapters on a model."""

    prefix = "delora_"
    layer_classes = name_layers(DeloraLayer, globals(), "Delora")
    method: ClassVar[DeLoRA] = DeLoRA()
