"""AdaMSS: the rows of the weight fall into clusters, and each cluster learns in a small subspace of its own.

    [W' | b'] = [W | b] + D,   D[rows of cluster k] = B_k A_k N

N (r, in + 1) holds the leading right singular vectors of [W0 | b0], W0 and b0 those of the base (no b0 in a layer
without bias). Clusters are those of k-means on the left ones, (out, r). A_k (q, r) starts at the leading directions of
its rows, and B_k (rows, q) at zero, so training starts at the base model. N is kept in files; the clusters are found
again from the base weight and the seed. The rows of stacked matrices (experts) are dealt out together. Source: Zheng et
al. 2025, AdaMSS: Adaptive Multi-Subspace Approach. Different from the peer: every layout, no need of scikit-learn, and
an A that does not depend on the global generator.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...core.method import LowRank, Site
from ...core.stack import Adapter, Stack
from ...errors import PeftWarning
from ..kmeans import labels

SEED, ROUNDS = 123456789, 10  # of k-means, as the peer has them


class Deal:
    """[W0 | b0] decomposed: N (r, columns), the left vectors U (rows, r), and the rows of each cluster."""

    def __init__(self, W: Tensor, b: Tensor | None, c: Any, path: str):
        if W.device.type == "meta":
            raise ValueError(
                f"AdaMSS groups the rows of {path!r} by their numbers, which the meta device lacks. Load the base "
                "model first, then add the adapter."
            )
        rows = W.detach().float().flatten(0, -2)
        rows = rows if b is None else torch.cat([rows, b.detach().float().view(-1, 1)], 1)
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(c.random_seed)
            self.U, _, V = torch.svd_lowrank(rows, q=min(c.r, *rows.shape), niter=2)
        self.N = V.mT.contiguous()
        found = labels(self.U, min(c.num_subspaces, len(rows)), ROUNDS, SEED)
        self.clusters = [at for k in range(int(found.max()) + 1) if len(at := (found == k).nonzero()[:, 0])]

    def rank(self, at: Tensor, c: Any) -> int:
        """q of a cluster."""
        most = min(len(at), c.subspace_rank, self.U.shape[1])
        if not c.use_dynamic_rank:
            return most
        size = torch.linalg.svdvals(self.U[at.to(self.U.device)]).square()  # those of X X'
        return max(1, min(most, int((size > c.svd_threshold * size[0]).sum())))

    def places(self) -> Tensor:
        """Where each row stands when the clusters are put one below another."""
        return torch.cat(self.clusters).argsort().to(self.N.device)

    def shadow(self, N: Tensor) -> Tensor:
        """A fixed vector seen through the space of N's rows: the same for every basis of that space."""
        probe = torch.linspace(-1, 1, N.shape[1], dtype=N.dtype, device=N.device).sin_()
        return N.mT @ (N @ probe)


class AdaMSS(LowRank):
    """[W' | b'] = [W | b] + D."""

    def build(self, site: Site) -> dict[str, Any]:
        c, deal = site.settings, Deal(*site.original(), site.settings, site.path)
        shapes = [(len(at), deal.rank(at, c)) for at in deal.clusters]
        A = nn.ParameterList(nn.Parameter(torch.empty(q, len(deal.N), **site.kwargs)) for _, q in shapes)
        B = nn.ParameterList(nn.Parameter(torch.zeros(n, q, **site.kwargs)) for n, q in shapes)
        A.__dict__["deal"] = deal  # until the adapter is in place
        return {
            "adamss_A": A,
            "adamss_B": B,
            "adamss_newB": nn.Buffer(deal.N.to(**site.kwargs)),
            "num_subspaces": len(deal.clusters),
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        deal = self.deal(p)
        for A, B, at in zip(p.adamss_A, p.adamss_B, deal.clusters, strict=True):
            right = torch.linalg.svd(deal.U[at.to(deal.U.device)])[2]
            A.copy_(right[: len(A)])
            if not p.settings.init_weights:
                B.normal_(0, 0.01)

    def derive(self, p: Adapter, inner: Stack) -> None:
        deal = self.deal(p)
        p.adamss_A.__dict__.pop("deal", None)
        p.layer.keep(p, "adamss_places", deal.places())
        p.layer.keep(p, "adamss_shadow", deal.shadow(deal.N))

    def deal(self, p: Adapter) -> Deal:
        """The decomposition; what `build` has found, if it is still there."""
        kept = p.adamss_A.__dict__.get("deal")
        return kept or Deal(p.layer.original_weight(), p.layer.original_bias(), p.settings, p.path)

    @torch.no_grad()
    def follow_base(self, p: Adapter, inner: Stack) -> None:
        if p.layer.original_weight_device().type == "meta" or not p.has("adamss_places"):
            return
        if not torch.equal(self.deal(p).places(), p.held_buffer("adamss_places")):
            self.warn(p, "the new base weight")

    @torch.no_grad()
    def written(self, p: Adapter) -> None:
        N, wanted = p.held_buffer("adamss_newB").float(), p.held_buffer("adamss_shadow")
        if (Deal.shadow(self, N) - wanted).norm() > 1e-2 * wanted.norm():  # type: ignore[arg-type]
            self.warn(p, "the file")

    def warn(self, p: Adapter, what: str) -> None:
        """Say that rows may belong elsewhere."""
        text = (
            f"The principal directions of {p.path!r} in {what} are not those that adapter {p.name!r} was made from, so "
            "rows may fall into other clusters than when it was trained. Load the adapter on the base model that it "
            "was trained on, with its random_seed, and after the base weights are in place."
        )
        warnings.warn(text, PeftWarning, stacklevel=2)

    def takes(self, p: Adapter, key: str, shape: tuple[int, ...]) -> bool:
        kind, _, k = key.partition(".")
        if not p.settings.use_dynamic_rank or kind not in ("adamss_A", "adamss_B") or len(shape) != 2:
            return False
        axis = 1 if kind == "adamss_A" else 0
        return bool(getattr(p, kind)[int(k)].shape[axis] == shape[axis])

    def down(self, p: Adapter) -> Tensor:
        """The A_k N below each other, (all q, columns)."""
        A = torch.cat(list(p.held("adamss_A")))
        return A @ p.held_buffer("adamss_newB").to(A.dtype)

    def up(self, p: Adapter) -> Tensor:
        """The B_k in the places of their rows, (..., O, all q)."""
        lead = p.layer.view.shape(p.layer.get_base_layer())[:-1]
        return torch.block_diag(*p.held("adamss_B"))[p.held_buffer("adamss_places")].unflatten(0, lead)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        inp = p.layer.view.shape(p.layer.get_base_layer())[-1]
        return self.down(p)[:, :inp], self.up(p)

    def up_bias(self, p: Adapter) -> Tensor | None:
        inp = p.layer.view.shape(p.layer.get_base_layer())[-1]
        if p.held_buffer("adamss_newB").shape[1] == inp:
            return None
        return self.up(p) @ self.down(p)[:, inp]
