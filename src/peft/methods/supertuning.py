"""Super-Tuning: only the weights of the largest (or smallest) magnitude are changed; "Supra" adds a LoRA to that.

    W' = W + V + (alpha / r) B A,   V (out, in) is zero but for n values, where |W0| is largest

n is int(out in (1 - sparsity)); V and B start at zero, so training starts at the base model; B A needs `r`. The values
are in the order of |W0|, W0 being the base weight; files hold their places unless save_precomputed_indices=False.
Source: arXiv 2607.09287, as the peer cites it. Different from the peer: every layout, each expert with its own places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core import draw
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import LowRank, Site
from ..core.sparse import Sparse
from ..core.stack import Adapter, Stack
from ..errors import PeftWarning, report
from ..target_config import number, probability, rank
from .additive import AdditiveConfig, AdditiveModel

FACTORS = ("supertuning_lora_A", "supertuning_lora_B")


@dataclass
class SupertuningConfig(AdditiveConfig):
    """The configuration of Super-Tuning."""

    kind = "SUPERTUNING"
    added = frozenset({"bias", "exclude_modules", "layers_to_transform", "layers_pattern"})
    ranks = ()
    sparsity: float = field(default=0.99, metadata=describe("Share of the weights that stay as they are, in [0, 1)."))
    select_top: bool = field(default=True, metadata=describe("Change the largest weights; else the smallest."))
    r: int | None = field(default=None, metadata=describe("Rank of a LoRA beside them; none if not set."))
    lora_alpha: float | None = field(default=None, metadata=describe("B A is multiplied by alpha / r; 2 r if not set."))
    lora_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of A, in [0, 1)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))
    save_precomputed_indices: bool = field(default=True, metadata=describe("Keep the places in files."))

    def check(self) -> None:
        """Numbers; alpha goes with a rank."""
        probability("sparsity", self.sparsity)
        probability("lora_dropout", self.lora_dropout)
        if self.r is not None:
            rank("r", self.r)
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
            number("lora_alpha", self.lora_alpha)
        elif self.lora_alpha is not None:
            raise ValueError(f"lora_alpha={self.lora_alpha} belongs to a LoRA, but r is not set. Set r as well.")
        elif self.lora_dropout:
            report(PeftWarning, "lora_dropout has no effect without a LoRA. Set r, or leave it out.", None, 5)


class SuperTuning(Sparse):
    """W' = W + V."""

    linear: ClassVar[dict[str, float]] = {"supertuning_values": 0.0}
    by_rows = False
    numbers_key, places_key = "supertuning_values", "supertuning_indices"

    def build(self, site: Site) -> dict[str, Any]:
        c, (*lead, out, inp) = site.settings, site.view.shape(site.module)
        if (n := int(out * inp * (1 - c.sparsity))) < 1:
            raise ValueError(f"sparsity={c.sparsity} leaves none of {site.path!r}'s {out * inp} weights. Lower it.")
        places = nn.Buffer(torch.zeros(*lead, n, dtype=torch.int32, device=site.device))
        return {
            self.numbers_key: nn.Parameter(torch.empty(*lead, n, **site.kwargs)),
            **({self.places_key: places} if c.save_precomputed_indices else {}),
            **{"supertuning_rank": c.r, "supertuning_lora_alpha": c.lora_alpha, "largest": c.select_top, "count": n},
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        p.supertuning_values.zero_() if p.settings.init_weights else p.supertuning_values.normal_()
        if p.settings.save_precomputed_indices:
            p.held_buffer("supertuning_indices").copy_(self.places(p))

    def derive(self, p: Adapter, inner: Stack) -> None:
        if not p.settings.save_precomputed_indices and p.layer.original_weight_device().type != "meta":
            p.layer.keep(p, "supertuning_indices", self.places(p).to(torch.int32))

    follow_base = derive

    def places(self, p: Adapter) -> Tensor:
        """Where the base weight is largest, (..., n): places in each flattened matrix, in this order."""
        return p.original_weight().detach().abs().flatten(-2).topk(p.count, largest=p.largest).indices

    def sparse(self, p: Adapter) -> Tensor:
        """V, (..., O, I)."""
        values, at = p.held(self.numbers_key), p.held_buffer(self.places_key)
        return draw.spread(values, at.long(), p.layer.view.shape(p.layer.get_base_layer()))

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        return self.sparse(p)[..., rows, :]


class Beside(LowRank):
    """The s B A of Supra."""

    dropout = "supertuning_lora_dropout"

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return p.held(FACTORS[0]).weight, p.held(FACTORS[1]).weight

    def scaling(self, p: Adapter) -> Any:
        return p.supertuning_lora_alpha / p.supertuning_rank


class Supra(SuperTuning):
    """W' = W + V + s B A."""

    linear: ClassVar[dict[str, float]] = {}
    beside = Beside()

    def build(self, site: Site) -> dict[str, Any]:
        *lead, out, inp = site.view.shape(site.module)
        shapes = ((site.settings.r, inp), (out, site.settings.r))
        made = (nn.ParameterDict({"weight": torch.empty(*lead, *s, **site.kwargs)}) for s in shapes)
        both = {**dict(zip(FACTORS, made, strict=True)), "supertuning_lora_dropout": site.dropout("lora_dropout")}
        return {**super().build(site), **both}

    def init(self, p: Adapter, inner: Stack) -> None:
        super().init(p, inner)
        for t, zero in zip(self.beside.factors(p), (False, p.settings.init_weights), strict=True):
            t.zero_() if zero else draw.kaiming(t)

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        return self.sparse(p)[..., rows, :] + self.beside.delta(p, W, rows)

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        return self.beside.onto(p, inner, (y + inner.linear(x, self.sparse(p))).to(y.dtype), x)


class SupertuningLayer(BaseTunerLayer):
    """A target under Super-Tuning."""

    family, _bare = "supertuning", True
    adapter_layer_names = ("supertuning_values", *FACTORS)
    other_param_names = tuple(f"supertuning_{name}" for name in ("indices", "rank", "lora_alpha", "lora_dropout"))
    _parameter_homes = frozenset({"supertuning_values"})


class SupertuningModel(AdditiveModel):
    """Super-Tuning on a model."""

    prefix = "supertuning_"
    layer_classes = name_layers(SupertuningLayer, globals())
    method: ClassVar[SuperTuning] = SuperTuning()
    supra: ClassVar[Supra] = Supra()

    @classmethod
    def plain_method_of(cls, settings: Any) -> Any:
        """With a LoRA, if there is a rank."""
        return cls.method if settings.r is None else cls.supra
