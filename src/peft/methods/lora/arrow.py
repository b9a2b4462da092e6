"""Arrow: each token goes to the adapters whose updates answer it most.

    p_e = the first right singular vector of B_e A_e,   w = softmax over the k largest |x . p_e| / temperature
    y = W x + sum_e w_e s_e B_e A_e x

The experts are the layer's other LoRA adapters. With GenKnowSub the mean factors of general adapters (gks_0, gks_1, and
so on) are taken from each expert's, without changing what the experts hold. Nothing is trained. Sources: Ostapenko et
al. 2024, arXiv 2405.11157, algorithm 1; GenKnowSub: arXiv 2505.10939.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.cells import references
from ...core.draw import normal
from ...core.method import Site
from ...core.stack import Adapter, Stack
from ...kernels.modes import lasting, ordinary, recorded
from ...kernels.sparse import state
from .method import LoRA

ROUTER = "arrow_router"
TURNS = 15  # of the power iteration


class Arrow(LoRA):
    """Routes each token among the layer's other adapters; its own factors are not used."""

    additive = False
    mergeable = False

    def build(self, site: Site) -> dict[str, Any]:
        if not site.view.dense:
            raise TypeError(
                f"arrow_config routes the tokens of linear layers, but {site.path!r} is a {site.view.label}. Use "
                "experts on linear layers only."
            )
        return {**super().build(site), "routes": True}

    def refuse_merge(self, p: Adapter) -> None:
        raise RuntimeError(
            f"The adapter {p.name!r} is a router, which chooses experts for each token, so it cannot be merged. Keep "
            "it unmerged, or merge one of the experts."
        )

    lasting = False  # its experts are other adapters

    def prepare(self, p: Adapter) -> None:
        p.hot = None
        for a in [a for several in self.experts(p) for a in several]:  # under compile they are found by reference
            a.direct = references(p.layer, a.name)
        p.cache["start"] = start(p.layer.view.shape(p.layer.get_base_layer())[-1], p.settings.arrow_config.rng_seed)

    def experts(self, p: Adapter) -> tuple[list[Adapter], list[Adapter]]:
        """The experts and the general adapters of the layer."""
        others = [a for n, a in p.layer.adapters.items() if n != p.name and not a.__dict__.get("routes")]
        general = [a for a in others if re.fullmatch(r"gks_\d+", a.name)]
        return [a for a in others if a not in general], general

    def tables(self, p: Adapter) -> tuple[Tensor, Tensor, Tensor]:
        """Prototypes (e, I), all A (e, r, I) and all s B (e, O, r); made anew when a factor changes."""
        experts, general = self.experts(p)
        if not experts:
            raise ValueError(f"The router {p.name!r} at {p.path!r} has no adapter to route to. Load the experts first.")
        pairs: dict[str, Any] = {a.name: a.method.factors(a) for a in (*experts, *general)}
        options = p.settings.arrow_config
        if recorded():
            with torch.no_grad():
                return _tables(options, experts, general, pairs, p.cache["start"])
        key = [(n, *state(t), t.device, t.dtype) for n, pair in pairs.items() for t in pair]
        if p.cache.get("key") != key:
            with ordinary(), torch.no_grad():
                tables = _tables(options, experts, general, pairs, p.cache["start"])
            if not lasting():
                return tables
            p.cache.update(key=key, tables=tables, pairs=pairs)  # while these live nothing else lies where they do
        return p.cache["tables"]

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        options = p.settings.arrow_config
        prototypes, A, B = self.tables(p)
        x = x.to(A.dtype)
        likeness = F.linear(x, prototypes).abs()
        k = min(options.top_k, len(prototypes))
        value, chosen = likeness.topk(k, dim=-1)
        w = torch.zeros_like(likeness).scatter(-1, chosen, (value / options.router_temperature).softmax(-1))
        h = torch.einsum("...i,eri->...er", x, A) * w[..., None]
        update = torch.einsum("...er,eor->...o", h, B)
        return (y + F.dropout(update, self.drop_rate(p))).to(y.dtype)


def _tables(options: Any, experts: Any, general: Any, pairs: Any, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    A, B = (torch.stack([pairs[a.name][i] for a in experts]) for i in (0, 1))
    if options.use_gks and general:
        A = A - torch.stack([pairs[a.name][0] for a in general]).mean(0)
        B = B - torch.stack([pairs[a.name][1] for a in general]).mean(0)
    prototypes = torch.stack([prototype(a, b, first) for a, b in zip(A, B, strict=True)])
    scalings = torch.tensor([float(a.scaling) for a in experts], dtype=B.dtype, device=B.device)
    return prototypes, A, B * scalings[:, None, None]


def start(size: int, seed: int | None) -> Tensor:
    """Where the power iteration begins, (I,)."""
    return normal((size,), torch.Generator().manual_seed(0 if seed is None else seed))


def prototype(A: Tensor, B: Tensor, first: Tensor) -> Tensor:
    """Nearly the first right singular vector of B A, (I,), by power iteration."""
    v, A, gram = first.to(A.device), A.float(), B.float().mT @ B.float()
    for _ in range(TURNS):
        v = F.normalize(A.mT @ (gram @ (A @ v)), dim=0)
    return v.to(B.dtype)
