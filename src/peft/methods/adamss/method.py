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

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.direct import open_linear
from ...core.files import keys_in_hand
from ...core.kept import kept
from ...core.method import LowRank, Site
from ...core.stack import Adapter, Stack
from ...errors import PeftWarning
from ...kernels import onto
from .deal import Deal, Unknown


class AdaMSS(LowRank):
    """[W' | b'] = [W | b] + D."""

    keeps_factors = True

    def build(self, site: Site) -> dict[str, Any]:
        c, (W, b) = site.settings, site.original()
        unknown = W.is_meta and bool(keys_in_hand())  # a file says how the rows are dealt out
        count = sum(f".{site.path}.adamss_B." in f".{key}" for key in keys_in_hand()) if unknown else 0
        deal = Unknown(W, b, c, count) if unknown else Deal(W, b, c, site.path)
        shapes = [(len(at), deal.rank(at, c)) for at in deal.clusters]
        A = nn.ParameterList(nn.Parameter(torch.empty(q, len(deal.N), **site.kwargs)) for _, q in shapes)
        B = nn.ParameterList(nn.Parameter(torch.zeros(n, q, **site.kwargs)) for n, q in shapes)
        A.__dict__["deal"] = None if unknown else deal  # until the adapter is in place
        return {
            "adamss_A": A,
            "adamss_B": B,
            "adamss_newB": nn.Buffer(deal.N.to(**site.kwargs)),
            "num_subspaces": len(deal.clusters),
            "guessed": unknown,
            "frozen": (),
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
        if p.guessed:
            self.check(p, [len(at) for at in deal.clusters])
        p.layer.keep(p, "adamss_places", deal.places())
        p.layer.keep(p, "adamss_shadow", deal.shadow(deal.N))

    def deal(self, p: Adapter) -> Deal:
        """The decomposition; what `build` has found, if it is still there."""
        kept = p.adamss_A.__dict__.get("deal")
        return kept or Deal(p.layer.original_weight(), p.layer.original_bias(), p.settings, p.path)

    @torch.no_grad()
    def follow_base(self, p: Adapter, inner: Stack) -> None:
        if p.layer.original_weight_device().type == "meta":
            return
        if not p.has("adamss_places"):
            self.derive(p, inner)
            self.written(p)
        elif not torch.equal(self.deal(p).places(), p.held_buffer("adamss_places")):
            self.warn(p, "the new base weight")

    @torch.no_grad()
    def written(self, p: Adapter) -> None:
        if not p.has("adamss_places"):
            self.check(p, [len(B) for B in p.adamss_B])
            return
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

    def check(self, p: Adapter, sizes: list[int]) -> None:
        """Raise ValueError unless the tensors of a file, whose shapes were not known before, are those of clusters."""
        held = [(len(A), *B.shape) for A, B in zip(p.adamss_A, p.adamss_B, strict=True)]
        rows = math.prod(p.layer.view.shape(p.layer.get_base_layer())[:-1])
        if sum(sizes) != rows or held != [(q, n, q) for (q, *_), n in zip(held, sizes, strict=False)]:
            raise ValueError(
                f"The clusters of the {rows} rows of {p.path!r} have {sizes} rows, but those of adapter {p.name!r} "
                f"have {[n for _, n, _ in held]}. Load the adapter on the base model that it was trained on."
            )

    def takes(self, p: Adapter, key: str, shape: tuple[int, ...]) -> bool:
        kind, _, k = key.partition(".")
        if not (p.settings.use_dynamic_rank or p.guessed) or kind not in ("adamss_A", "adamss_B") or len(shape) != 2:
            return False
        axis = 1 if kind == "adamss_A" else 0
        return bool(getattr(p, kind)[int(k)].shape[axis] == shape[axis]) or (p.guessed and axis == 0)

    def down(self, p: Adapter) -> Tensor:
        """The A_k N below each other, (all q, columns)."""
        A = torch.cat(list(p.held("adamss_A")))
        return A @ p.held_buffer("adamss_newB").to(A.dtype)

    def up(self, p: Adapter) -> Tensor:
        """The B_k in the places of their rows, (..., O, all q)."""
        lead = p.layer.view.shape(p.layer.get_base_layer())[:-1]
        return torch.block_diag(*p.held("adamss_B")).index_select(0, self.places(p)).unflatten(0, lead)

    def places(self, p: Adapter) -> Tensor:
        """Where the rows of the clusters belong; found now if the base weight was not there before."""
        if not torch.compiler.is_compiling() and not p.has("adamss_places"):
            self.follow_base(p, p.layer.stack(()))
            if not p.has("adamss_places"):
                raise RuntimeError(
                    f"The clusters of {p.path!r} are found from the base weight, which is not there yet."
                )
        return p.held_buffer("adamss_places")

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        inp = p.layer.view.shape(p.layer.get_base_layer())[-1]
        return self.down(p)[:, :inp], self.up(p)

    def up_bias(self, p: Adapter) -> Tensor | None:
        inp = p.layer.view.shape(p.layer.get_base_layer())[-1]
        return self.up(p) @ self.down(p)[:, inp] if self.has_bias(p, inp) else None

    def has_bias(self, p: Adapter, inp: int) -> bool:
        """Whether N has a column for the bias."""
        return bool(p.held_buffer("adamss_newB").shape[1] != inp)

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held = None if torch.compiler.is_compiling() else open_linear(inner, x)
        lean = p.held_buffer("adamss_newB").dtype is x.dtype or not torch.is_grad_enabled()  # else x is kept as it is
        if held is None or not lean or not self.has_bias(p, x.shape[-1]):
            return super().at_once(p, inner, x)
        down, up = kept(p, lambda: (self.down(p), self.up(p)))  # the column of the bias is a bias of the first product
        return onto.thin(x, *held, (F.linear(x.to(down.dtype), down[:, :-1], down[:, -1]).flatten(0, -2), up.mT, 1.0))
