"""OSF: the leading singular triples of the weight stay, and what is learnt beside them stays orthogonal to them.

    W' = W + U diag(S) V - U0 diag(S0) V0,   U0 S0 V0 the min(in, out) - k smallest singular triples of the base weight

U, S and V start at U0, S0 and V0, so training starts at the base model. U's gradient is projected on the complement of
the k leading left directions, V's on that of the right ones. k is `effective_rank`: a number, a share of min(in, out),
or half of it. All but U, S and V is computed from the base weight, and not saved. Source: Nayak et al. 2025, arXiv
2504.07097. Different from the peer: every layout; active adapters add up, as merged ones do; unmerging works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import describe
from ..core.defaults import INCLUDE_LINEAR_LAYERS_SHORTHAND, targets_by_model_type
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Site
from ..core.stack import Adapter, Stack
from ..core.terms import Moved
from ..errors import PeftWarning, report
from ..kernels.modes import single
from ..kernels.projected import Held, Parts
from ..target_config import number
from .additive import AdditiveConfig, AdditiveModel

LOW = ("U_low", "S_low", "V_low")
FIRST = tuple(f"osf_{name}_init" for name in LOW)


@dataclass
class OSFConfig(AdditiveConfig):
    """The configuration of OSF."""

    kind = "OSF"
    added = frozenset({"bias", "exclude_modules", "layers_to_transform", "layers_pattern"})
    ranks = ()
    searched = frozenset({"rank_pattern"})
    effective_rank: int | float | None = field(
        default=None, metadata=describe("Directions that stay: a number, or a share in (0, 1]; half if not set.")
    )
    rank_pattern: dict[str, int | float] | None = field(
        default=None, metadata=describe("Effective ranks that differ: {regular expression found in a name: rank}.")
    )
    init_weights: bool | None = field(default=True, metadata=describe("Start at the base model; else random."))
    target_svd_config: dict[str, int] | None = field(default=None, metadata=describe("Not used; see rank_pattern."))

    def check(self) -> None:
        """Numbers, and a word about the field that does nothing."""
        self.rank_pattern = self.rank_pattern or None
        for name, value in {"effective_rank": self.effective_rank, **(self.rank_pattern or {})}.items():
            number(name, 1 if value is None else value)
        if self.target_svd_config:
            report(PeftWarning, "target_svd_config has no effect. Use rank_pattern instead.", None, 5)


class OSF(Moved):
    """W' = W + U diag(S) V - U0 diag(S0) V0."""

    neutral_zeros = False
    may_be_empty = frozenset({"osf_svd_params.S_low"})  # where all directions stay

    def build(self, site: Site) -> dict[str, Any]:
        *lead, out, inp = site.view.shape(site.module)
        k = kept(site.path, site.settings.effective_rank, min(out, inp))
        m = min(out, inp) - k
        if not m:
            report(PeftWarning, f"effective_rank={k} keeps all of {site.path!r}, so nothing is trained there.", None, 9)
        shapes = ((out, m), (m,), (m, inp))
        made = {name: torch.empty(*lead, *s, **site.kwargs) for name, s in zip(LOW, shapes, strict=True)}
        return {"osf_svd_params": nn.ParameterDict(made), "effective_rank": k}

    def derive(self, p: Adapter, inner: Stack) -> None:
        W, held = p.original_weight().detach(), p.osf_svd_params
        if W.device.type == "meta":
            return
        parts = torch.linalg.svd(single(W), full_matrices=False)
        dtype, k = held["S_low"].dtype, p.effective_rank
        U, S, V = (t.to(W.dtype).to(dtype) for t in parts)  # rounded as in the adapters that files hold
        fresh = p.cache.pop("fresh", False)
        for name, first, t in zip(LOW, FIRST, (U[..., k:], S[..., k:], V[..., k:, :]), strict=True):
            p.layer.keep(p, first, t.contiguous())
            if fresh:
                held[name].copy_(t)
        if U.shape[-2] > U.shape[-1]:  # else the other directions span the complement
            p.layer.keep(p, "osf_U_high", U[..., :k].contiguous())
        if V.shape[-1] > V.shape[-2]:
            p.layer.keep(p, "osf_V_high", V[..., :k, :].contiguous())

    follow_base = derive

    def init(self, p: Adapter, inner: Stack) -> None:
        if p.layer.original_weight_device().type == "meta":
            raise ValueError(f"The weight of {p.path!r} has no numbers yet (meta device), and OSF starts from them.")
        p.cache["fresh"] = p.settings.init_weights is not False  # `derive` fills the tensors
        for t in () if p.cache["fresh"] else p.osf_svd_params.values():
            t.normal_()

    def moved(self, p: Adapter) -> tuple[Parts, Parts, tuple[Held, Held]]:
        """(V, U, S), as they were first, and what V's rows and U's columns may move in: a span, or a complement."""
        held, (U0, S0, V0) = p.held("osf_svd_params"), (p.held_buffer(name) for name in FIRST)
        U, S, V = (getattr(held, name) for name in LOW)
        wide, tall = (n > S.shape[-1] + p.effective_rank for n in (V.shape[-1], U.shape[-2]))
        right, left = p.held_buffer("osf_V_high") if wide else V0, p.held_buffer("osf_U_high") if tall else U0
        return (V, U, S), (V0, U0, S0), ((right.mT, not wide), (left, not tall))


def kept(path: str, rank: int | float | None, most: int) -> int:
    """How many of `most` directions stay."""
    share = isinstance(rank, float) and 0 < rank <= 1
    k = most // 2 if rank is None else int(rank * most) if share else int(rank)
    if k < 1:
        raise ValueError(f"effective_rank={rank} keeps {k} of the {most} directions of {path!r}. Keep at least one.")
    return min(k, most)


class OSFLayer(BaseTunerLayer):
    """A target under OSF."""

    family = "osf"
    adapter_layer_names = ("osf_svd_params",)
    other_param_names = ("effective_rank",)


class OSFModel(AdditiveModel):
    """OSF adapters on a model."""

    prefix = "osf_"
    layer_classes = name_layers(OSFLayer, globals())
    method: ClassVar[OSF] = OSF()

    @classmethod
    def prepare_config(cls, config: Any, model_type: str | None) -> None:
        """All linear layers, where nothing is targeted and the model type has no usual targets."""
        if config.target_modules is config.target_parameters is None and model_type not in targets_by_model_type("OSF"):
            config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
