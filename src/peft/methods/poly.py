"""Poly: a low-rank update for each task, mixed from an inventory of skills that all tasks share.

    y_e = W x_e + B_e A_e x_e / r
    A_e: sum_s w_eqs A_qs of each block q of in-features, side by side;   B_e: of out-features, one below another

for an example e of task t. The weights w are sigmoid(Z_t), over their sum over the skills s; Z is learnt, a row for
each task. In training the sigmoid is replaced by a sample of a relaxed Bernoulli variable (temperature 1). With
n_splits > 1 each block has weights of its own (multi-head routing). B starts at zero, so training starts at the base.
Sources: Ponti et al. 2022, arXiv 2202.13914, section 3; Caccia et al. 2022, arXiv 2211.03831.

Which task each sample has is given with each call: `model(x, task_ids=ids)`. There is no one W', so nothing is merged.
A module that reads its weight (attention, parameters, of which each expert has factors of its own) runs once for each
task of a batch, and in training draws a sample for each task instead of each example.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import describe
from ..core.draw import kaiming
from ..core.kept import kept, lasting
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Delta, Site
from ..core.stack import Adapter, Stack
from ..core.tuner import BaseTuner
from ..kernels.modes import NARROW
from ..target_config import TargetConfig, choice, divisor


@dataclass
class PolyConfig(TargetConfig):
    """The configuration of Poly."""

    kind = "POLY"
    added = frozenset({"layers_to_transform", "layers_pattern", "bias"})
    ranks = ("r", "n_tasks", "n_skills", "n_splits")
    r: int = field(default=8, metadata=describe("Rank; the update is divided by it."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else all at random."))
    poly_type: str = field(default="poly", metadata=describe("How skills are mixed; there is only 'poly'."))
    n_tasks: int = field(default=1, metadata=describe("How many tasks there are; task_ids are below it."))
    n_skills: int = field(default=4, metadata=describe("How many skills (pairs of factors) the tasks share."))
    n_splits: int = field(default=1, metadata=describe("Blocks of features with weights of their own; divides both."))

    def check(self) -> None:
        """Names."""
        choice("poly_type", self.poly_type, ("poly",))


class PolyRouter(nn.Module):
    """Holds Z, (n_tasks, n_splits n_skills)."""

    def __init__(self, tasks: int, width: int, **kwargs: Any):
        super().__init__()
        self.module_logits = nn.Parameter(torch.empty(tasks, width, **kwargs))


class Poly(Delta):
    """W x + B_e A_e x / r, with factors for each example."""

    additive = False
    mergeable = False
    by_task = True

    def build(self, site: Site) -> dict[str, Any]:
        c, q, view = site.settings, site.settings.n_splits, site.view
        *lead, out, inp = view.shape(site.module)
        divisor("n_splits", q, (inp, out), site.path, ", for this layer alone with module_config")
        return {
            "poly_router": PolyRouter(c.n_tasks, q * c.n_skills, **site.kwargs),
            "poly_lora_A": nn.Parameter(torch.empty(*lead, q, c.n_skills, inp // q, c.r, **site.kwargs)),
            "poly_lora_B": nn.Parameter(torch.empty(*lead, q, c.n_skills, c.r, out // q, **site.kwargs)),
            **{name: getattr(c, name) for name in c.ranks},
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        kaiming(p.poly_lora_A.mT)
        p.poly_lora_B.zero_() if p.settings.init_weights else kaiming(p.poly_lora_B.mT)
        p.poly_router.module_logits.uniform_(-1e-3, 1e-3)

    def refuse_merge(self, p: Adapter) -> NoReturn:
        raise NotImplementedError(
            f"The adapter {p.name!r} at {p.path!r} has another update for each task (Poly), so no weight holds it and "
            "it cannot be merged. Keep it apart."
        )

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        self.refuse_merge(p)

    def live_delta(self, p: Adapter, W: Tensor) -> Tensor:
        """Where the module reads its weight: that of the one task that its rows have."""
        w = self.mixture(p, p.layer.call.one_task(p.n_tasks, W.device, p.path))[0]
        A, B = p.held("poly_lora_A"), p.held("poly_lora_B")
        down = torch.einsum("qs,...qsir->...qir", w.to(A.dtype), A).flatten(-3, -2)
        up = torch.einsum("qs,...qsro->...rqo", w.to(A.dtype), B).flatten(-2)
        return (down @ up).mT / p.r

    def mixture(self, p: Adapter, ids: Tensor) -> Tensor:
        """w, (rows, n_splits, n_skills)."""
        Z = p.held("poly_router").module_logits
        if lasting(p):
            return kept(p, lambda: self.shares(p, Z)).index_select(0, ids)
        return self.shares(p, F.embedding(ids, Z))  # which takes no id from the end, as index_select

    def shares(self, p: Adapter, Z: Tensor) -> Tensor:
        """What each skill has of a block, from logits (rows, n_splits n_skills)."""
        Z = Z.float() if Z.dtype in NARROW else Z
        if p.layer.training:
            least = torch.finfo(Z.dtype).eps
            Z = Z + torch.rand_like(Z).clamp(least, 1 - least).logit()
        w = Z.sigmoid().unflatten(-1, (p.n_splits, -1))
        return w / (w.sum(-1, keepdim=True) + 1e-12)

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        A, B = p.held("poly_lora_A"), p.held("poly_lora_B")
        axis = -inner.spread(B.new_empty(1)).dim()  # of the features
        rows = 1 if y.dim() == -axis else y.shape[0]  # else there is no batch
        w = self.mixture(p, p.layer.call.task_of_row(rows, p.n_tasks, y.device, p.path)).to(A.dtype)
        if inner.view.dense and y.dim() > 2:  # factors for each example pay where it has several positions
            down, up = (torch.bmm(w.transpose(0, 1), f.flatten(2)).unflatten(-1, f.shape[2:]) for f in (A, B))
            h, up = x.to(A.dtype).flatten(1, -2) @ down.transpose(0, 1).flatten(1, 2), up.permute(1, 2, 0, 3).flatten(2)
            return torch.baddbmm(y.flatten(1, -2).to(h.dtype), h, up, alpha=1 / p.r).view(y.shape).to(y.dtype)
        return (y + self.by_skill(p, inner, x, w, axis) / p.r).to(y.dtype)

    def by_skill(self, p: Adapter, inner: Stack, x: Tensor, w: Tensor, axis: int) -> Tensor:
        """The same, with the products of all skills mixed afterwards, on any layout."""
        A, B, g = p.held("poly_lora_A"), p.held("poly_lora_B"), inner.view.groups(inner.base)
        down = torch.block_diag(*A.mT.flatten(1, 2))  # (q s r, I)
        up = torch.block_diag(*B.permute(0, 3, 1, 2).flatten(2))  # (O, q s r)
        h = inner.linear(x, down.repeat(g, 1))
        axis %= h.dim()
        h = h.movedim(axis, -1).unflatten(-1, (g, *A.shape[:2], p.r))
        w = w.view(-1, *[1] * (h.dim() - 4), *A.shape[:2], 1)
        h = ((h * w).sum((-3, -2), keepdim=True) * w).flatten(-4)
        return inner.view.rows(h.movedim(h.dim() - 1, axis), torch.block_diag(*up.unflatten(0, (g, -1))))


class PolyLayer(BaseTunerLayer):
    """A target under Poly adapters."""

    family = "poly"
    adapter_layer_names = ("poly_lora_A", "poly_lora_B", "poly_router")
    other_param_names = ("r", "n_tasks", "n_skills", "n_splits")
    _home_order = ("poly_router", "poly_lora_A", "poly_lora_B")
    _parameter_homes = frozenset({"poly_lora_A", "poly_lora_B"})


class PolyModel(BaseTuner):
    """Poly adapters on a model."""

    prefix = "poly_"
    layer_classes = name_layers(PolyLayer, globals())
    method: ClassVar[Poly] = Poly()
