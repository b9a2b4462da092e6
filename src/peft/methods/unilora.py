"""Uni-LoRA: the low-rank factors of all layers are read from one short vector that is learnt.

    W' = W + B A,   A[k, i] = c[a] t[a], a = IA[k, i],   B likewise with IB,   c[j] = 1 / sqrt(how often j is read)

t (D,) is one for the model; the places IA, IB come from a seed and deal 0 .. D-1 out to all layers as evenly as can be.
t starts at random, so training does not start at the base model. `save_indices` keeps places and c in files, which
then do not depend on numpy's generator. Source: Li et al. 2025, arXiv 2506.00799.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.kept import kept
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import LowRank, Site
from ..core.shared import Shared, is_late, on, unwritten
from ..core.stack import Adapter
from ..target_config import CHOSEN, number, probability
from .additive import AdditiveConfig, AdditiveModel
from .dealt import Deal


@dataclass
class UniLoraConfig(AdditiveConfig):
    """The configuration of Uni-LoRA."""

    kind = "UNILORA"
    added = frozenset({"exclude_modules"})
    ranks = ("r", "theta_d_length")
    together = frozenset({"r", *CHOSEN})
    r: int = field(default=4, metadata=describe("Rank."))
    proj_seed: int = field(default=42, metadata=describe("Seed of the places."))
    theta_d_length: int = field(default=256, metadata=describe("Length of the vector."))
    unilora_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of A, in [0, 1)."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_theta_d_bound: float = field(default=0.02, metadata=describe("The vector starts uniform in +- this."))
    init_weights: bool = field(default=True, metadata=describe("Start uniform; else normal."))
    save_indices: bool = field(default=False, metadata=describe("Keep places and factors in files."))

    def check(self) -> None:
        """Numbers; what all layers share is the same for all."""
        probability("unilora_dropout", self.unilora_dropout)
        number("init_theta_d_bound", self.init_theta_d_bound)
        if self.init_theta_d_bound <= 0:
            raise ValueError(f"init_theta_d_bound={self.init_theta_d_bound} must be above 0, such as 0.02.")
        for pattern, values in (self.module_config or {}).items():
            wrong = sorted({"r", "theta_d_length", "proj_seed", "save_indices"} & set(values))
            if wrong:
                raise ValueError(
                    f"module_config[{pattern!r}] sets {wrong[0]}, but all layers read one vector and share it out "
                    "together. Set it for the whole adapter."
                )


class UniLoRA(LowRank):
    """W' = W + B A, read from a vector."""

    dropout = "unilora_dropout"

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]]) -> dict[str, Shared]:
        count = sum(settings.r * math.prod(lead) * (out + inp) for *lead, out, inp in shapes)
        deal, before = Deal(count, settings.theta_d_length, settings.proj_seed), settings.__dict__.get("deal")
        if before is not None and before.waits and before.form == deal.form:
            deal = before  # the layers have booked their places there
        settings.__dict__["deal"], deal.waits = deal, is_late()
        theta, bound = unwritten(settings.theta_d_length), settings.init_theta_d_bound
        theta.uniform_(-bound, bound) if settings.init_weights else theta.normal_()
        made = {"unilora_theta_d": Shared(nn.Parameter(theta))}
        if not settings.save_indices:
            factor = unwritten(settings.theta_d_length) if is_late() else deal.factor
            made["unilora_factor"] = Shared(factor, saved=False)
        return made

    def build(self, site: Site) -> dict[str, Any]:
        c, deal = site.settings, site.settings.__dict__.get("deal")
        built: dict[str, Any] = {"unilora_dropout": site.dropout("unilora_dropout"), "r": c.r}
        if deal is None or not site.shared:  # a plan: nothing but theta is trained, and it is no layer's
            return built
        held: Any = nn.Buffer if c.save_indices else lambda t: t
        built["starts"] = starts = {}
        *lead, out, inp = site.view.shape(site.module)
        for side, shape in (("A", (*lead, c.r, inp)), ("B", (*lead, out, c.r))):
            starts[side] = deal.book(shape)
            at = torch.empty(shape, dtype=torch.int64, device="meta") if is_late() else deal.at(starts[side], shape)
            built[f"unilora_indices_{side}"] = held(on(site.place, at))
            if c.save_indices:
                scale = torch.empty_like(at, dtype=site.dtype) if is_late() else deal.factor[at]
                built[f"unilora_scales_{side}"] = nn.Buffer(on(site.place, scale.to(site.dtype)))
        return built

    def drawn(self, p: Adapter, keys: Collection[str]) -> Mapping[str, Tensor]:
        deal, found = p.settings.__dict__["deal"], {}
        for side in sorted({key[-1] for key in keys}):
            at = deal.at(p.starts[side], tuple(p.held_buffer(f"unilora_indices_{side}").shape))
            found.update({f"unilora_indices_{side}": at, f"unilora_scales_{side}": deal.factor[at]})
        return {key: found[key] for key in keys}

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return kept(p, lambda: self.read(p), what="factors")

    def read(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """`factors`, read from the vector now."""
        weight = p.layer.view.sample(p.layer.get_base_layer())
        theta = p.unilora_theta_d.to(p.held_buffer("unilora_indices_A").device)
        if weight is not None and weight.dtype is torch.float64:
            theta = theta.double()
        if p.settings.save_indices:
            A, B = (theta[p.held_buffer(f"unilora_indices_{s}")] * p.held_buffer(f"unilora_scales_{s}") for s in "AB")
            return A, B
        scaled = theta * p.unilora_factor.to(theta.device, theta.dtype)
        return scaled[p.held_buffer("unilora_indices_A")], scaled[p.held_buffer("unilora_indices_B")]


class UniLoraLayer(BaseTunerLayer):
    """A target under Uni-LoRA."""

    family = "unilora"
    _bare = True
    _sized = True
    other_param_names = ("r", "unilora_dropout", "unilora_indices_A", "unilora_indices_B")
    _home_order = ("unilora_dropout", "unilora_indices_A", "unilora_indices_B")


class UniLoraModel(AdditiveModel):
    """Uni-LoRA adapters on a model."""

    prefix = "unilora_"
    uses_shared_state = True
    layer_classes = name_layers(UniLoraLayer, globals())
    method: ClassVar[UniLoRA] = UniLoRA()
