"""HiRA: the weight times a low-rank matrix, element by element; of full rank although few numbers are learnt.

    W' = W + W0 * (B A),   A (r, in), B (out, r),   W0 the base weight

B starts at zero (A, on an embedding), so training starts at the base model. Several adapters add up, each of them a
multiple of the base weight. Source: Huang et al., ICLR 2025. Different from the peer: convolutions with groups, and
unmerging takes one adapter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.defaults import BNB_LAYERS
from ..core.draw import kaiming
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Delta, Site
from ..core.shared import Shared
from ..core.stack import Adapter, Stack
from ..target_config import choice, probability
from .additive import AdditiveConfig, AdditiveModel

NAMES = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")


@dataclass
class HiraConfig(AdditiveConfig):
    """The configuration of HiRA."""

    kind = "HIRA"
    corrected = False
    added = frozenset({"bias"})
    r: int = field(default=32, metadata=describe("Rank of the factors."))
    hira_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of the update, in [0, 1)."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool | str | None = field(
        default=True, metadata=describe("Start at the base model (True, 'gaussian'); else both factors random.")
    )
    rank_pattern: dict | None = field(
        default_factory=dict, metadata=describe("Ranks that differ from r: {regular expression of names: rank}.")
    )

    def check(self) -> None:
        """Numbers and choices."""
        probability("hira_dropout", self.hira_dropout)
        choice("init_weights", self.init_weights, (True, False, None, "gaussian"))


class HiRA(Delta):
    """W' = W + W0 * (B A)."""

    dropout = "hira_dropout"
    reads = True

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]]) -> dict[str, Shared]:
        """Nothing but a note that ranks differ: the peer's files have rank r all the same, and are taken."""
        settings.__dict__["patterned"] = bool(settings.rank_pattern)
        return {}

    def build(self, site: Site) -> dict[str, Any]:
        c, view, kernel = site.settings, site.view, site.view.kernel(site.module)
        *lead, out, inp = view.shape(site.module)
        ones = (1,) * len(kernel)
        return {
            "hira_dropout": nn.Identity() if view.infix else site.dropout("hira_dropout"),
            f"hira_{view.infix}A": _empty(site, *lead, c.r, inp // math.prod(kernel), *kernel),
            f"hira_{view.infix}B": _empty(site, *lead, out, c.r, *ones),
            "r": c.r,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        A, B = self.factors(p)
        start = p.settings.init_weights
        if p.layer.view.infix:
            B.normal_()
            A.normal_() if start is False else A.zero_()
        elif start:
            kaiming(A) if start is True else A.normal_(0, 1 / p.r)
            B.zero_()
        else:
            A.normal_()
            B.normal_()

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """(A, B) as matrices, (..., r, I) and (..., O, r)."""
        infix = p.layer.view.infix
        A, B = p.held(f"hira_{infix}A"), p.held(f"hira_{infix}B")
        lead = len(p.layer.view.shape(p.layer.get_base_layer())) - 2
        return A.flatten(lead + 1), B.flatten(lead + 1)

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        A, B = self.factors(p)
        return p.original_weight()[..., rows, :].to(A.dtype) * (B[..., rows, :] @ A)

    def takes(self, p: Adapter, key: str, shape: tuple[int, ...]) -> bool:
        held = p.held(key).shape
        at = len(p.layer.view.shape(p.layer.get_base_layer())) - (2 if key.endswith("A") else 1)
        if not p.settings.__dict__.get("patterned") or len(shape) != len(held):
            return False
        return (*held[:at], *held[at + 1 :]) == (*shape[:at], *shape[at + 1 :])

    def written(self, p: Adapter) -> None:
        p.__dict__["r"] = self.factors(p)[0].shape[-2]


def _empty(site: Site, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, **site.kwargs))


class HiraLayer(BaseTunerLayer):
    """A target under HiRA adapters."""

    family = "hira"
    adapter_layer_names = NAMES
    other_param_names = ("r", "hira_dropout")
    _home_order = ("hira_dropout", *NAMES)
    _parameter_homes = frozenset(NAMES)


class HiraModel(AdditiveModel):
    """HiRA adapters on a model."""

    prefix = "hira_"
    layer_classes = name_layers(HiraLayer, globals(), packed=BNB_LAYERS)
    method: ClassVar[HiRA] = HiRA()
