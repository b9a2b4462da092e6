"""TinyLoRA: a few numbers, that many layers may share, turn the leading singular directions of every weight.

    W' = W + B R A,   A = S^(1/2) V',   B = U S^(1/2),   R = sum over t of v[t] P[t]

U S V' are the r largest singular triples of the base weight, P (u, r, r) is random and fixed, and v (u,) is learnt: one
for each layer, or for groups of neighbours with `weight_tying`, up to one for the model at 1. v starts at zero, so
training starts at the base model. A and B are saved, P too unless save_projection=False; it comes from a seed and the
number of the layer. An embedding (vocabulary, dim) is taken as it is stored. Source: Morris et al. 2026, "Learning to
reason in 13 parameters", arXiv 2602.04118. Different from the peer: every layout; `init_weights=False` draws v, which
is left to chance there; a convolution's or a parameter's weight is taken as (..., out, in).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.cells import reference
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import LowRank, Site
from ..core.shared import Shared, on, unwritten
from ..core.stack import Adapter, Stack
from ..target_config import CHOSEN, choice, number, probability
from .additive import AdditiveConfig, AdditiveModel
from .tinylora_places import Places, projection
from .vera import warn_unsaved


@dataclass
class TinyLoraConfig(AdditiveConfig):
    """The configuration of TinyLoRA."""

    kind = "TINYLORA"
    added = frozenset({"exclude_modules"})
    ranks = ("r", "u")
    together = CHOSEN
    r: int = field(default=2, metadata=describe("How many singular directions; fewer where a weight has fewer."))
    u: int = field(default=64, metadata=describe("Numbers in each vector v."))
    weight_tying: float = field(default=0.0, metadata=describe("From 0, a vector for each layer, to 1, one for all."))
    projection_seed: int = field(default=42, metadata=describe("Seed of P."))
    save_projection: bool = field(default=True, metadata=describe("Keep P in files."))
    init_v_bound: float = field(default=0.02, metadata=describe("v is uniform in +- this, if 'uniform'."))
    tinylora_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of A, in [0, 1)."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool | str = field(
        default=True, metadata=describe("v starts at zero (True), 'uniform', or normal (False).")
    )

    def check(self) -> None:
        """Numbers; what all layers count together is the same for all."""
        probability("tinylora_dropout", self.tinylora_dropout)
        number("init_v_bound", self.init_v_bound)
        choice("init_weights", self.init_weights, (True, False, "uniform"))
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"weight_tying={self.weight_tying} must lie in [0, 1]: 0 ties nothing, 1 everything.")
        for pattern, values in (self.module_config or {}).items():
            if wrong := sorted({"u", "weight_tying", "projection_seed"} & set(values)):
                raise ValueError(
                    f"module_config[{pattern!r}] sets {wrong[0]}, by which all layers are counted together. Set it for "
                    "the whole adapter."
                )
        warn_unsaved(self, "tinylora_P", "projection_seed")


class TinyLoRA(LowRank):
    """W' = W + B R A."""

    dropout = "tinylora_dropout"
    keeps_factors = True
    neutral_zeros = False  # an adapter of other layers counts them otherwise

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]]) -> dict[str, Shared]:
        places = settings.__dict__["places"] = Places(sum(1 for _ in shapes), settings.weight_tying)
        made, start, bound = {}, settings.init_weights, settings.init_v_bound
        for k in range(places.groups):
            v = unwritten(settings.u).zero_()
            if start is not True:
                v.uniform_(-bound, bound) if start == "uniform" else v.normal_()
            made[f"tinylora_v.{k}"] = Shared(nn.Parameter(v))
        return made

    def build(self, site: Site) -> dict[str, Any]:
        c, places = site.settings, site.settings.__dict__.get("places")
        *lead, out, inp = site.view.shape(site.module)
        r = min(c.r, out, inp)
        number = places.number(site.path) if places is not None else 0  # of a plan, which only counts
        P = projection(c, number, r).to(site.dtype)
        first, last = (out, inp) if not site.view.infix else (inp, out)
        return {
            "tinylora_dropout": site.dropout("tinylora_dropout"),
            "tinylora_A": nn.Buffer(torch.empty(*lead, r, last, **site.kwargs)),
            "tinylora_B": nn.Buffer(torch.empty(*lead, first, r, **site.kwargs)),
            "tinylora_P": nn.Buffer(P.to(site.device)) if c.save_projection else on(site.place, P),
            "r": r,
            "vector": places.vector(site.path) if places is not None else "",
        }

    def drawn(self, p: Adapter, keys: Collection[str]) -> Mapping[str, Tensor]:
        number = p.settings.__dict__["places"].number(p.path)
        return {"tinylora_P": projection(p.settings, number, p.r)} if "tinylora_P" in keys else {}

    def init(self, p: Adapter, inner: Stack) -> None:
        W = p.original_weight().mT if p.layer.view.infix else p.original_weight()
        U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
        root = S[..., : p.r].sqrt()
        p.held_buffer("tinylora_A").copy_(root[..., None] * Vh[..., : p.r, :])
        p.held_buffer("tinylora_B").copy_(U[..., : p.r] * root[..., None, :])

    def prepare(self, p: Adapter) -> None:
        p.shared = {p.vector: p.shared[p.vector]}  # the other layers' are none of its own
        p.direct["v"] = reference(p.shared[p.vector], p.name)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        A, B, P = (p.held_buffer(f"tinylora_{name}") for name in "ABP")
        v = p.referred("v") if torch.compiler.is_dynamo_compiling() else p.shared[p.vector].tensor(p.name)
        R = (v.to(P.device, P.dtype)[None] @ P.flatten(1)).view(P.shape[1:])
        # the factor that meets the input stays frozen, so that nothing of the input's size is kept
        return (B.mT, (R @ A).mT) if p.layer.view.infix else (A, B @ R)


class TinyLoraLayer(BaseTunerLayer):
    """A target under TinyLoRA."""

    family = "tinylora"
    _sized = True
    other_param_names = ("r", "tinylora_dropout", "tinylora_A", "tinylora_B", "tinylora_P")
    _home_order = ("tinylora_dropout", "tinylora_A", "tinylora_B", "tinylora_P")


class TinyLoraModel(AdditiveModel):
    """TinyLoRA adapters on a model."""

    prefix = "tinylora_"
    uses_shared_state = True
    layer_classes = name_layers(TinyLoraLayer, globals())
    method: ClassVar[TinyLoRA] = TinyLoRA()
