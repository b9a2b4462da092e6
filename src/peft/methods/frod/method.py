"""FRoD: layers of one kind share the right side of a decomposition of their weights; its full middle is learnt.

    W' = U (S + diag(l)) V',   W0 = U diag(l0) V',   so that   W' = W + U (S + diag(l - l0)) V'

V (in, in) is one for all layers of a kind (the last parts of their names); U (out, in) has columns of norm 1, and comes
from V and the base weight. S has `sparse_rate` of the places beside the diagonal, which a seed chooses. S starts at
zero and l at l0, so training starts at the base model. V: with Q R the weights below each other,

    V = R' E,   E the eigenvectors of the mean over the layers of (Q_k' Q_k + a I)^-1

Different from the peer: every layout (experts are layers, an embedding's table is W, in-features of another size a kind
of their own); the base weight stays, so the start is exact, and can be merged in bf16; U follows a file's V.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.cells import reference
from ...core.direct import open_linear
from ...core.draw import scatter
from ...core.homes import derived_again
from ...core.method import Delta, Site
from ...core.shared import Shared, Sight
from ...core.stack import Adapter, Stack
from ...kernels import onto, sparse
from .basis import PART, Kind, bases, kind_of, left, off_diagonal, places, table

SHARED = ("s_indices", "V")


class FRoD(Delta):
    """W' = W + U (S + diag(l - l0)) V'."""

    dropout = "frod_dropout"
    sums_from = 2.0
    may_be_empty = frozenset({"frod_lambda_s_values"})  # where `sparse_rate` chooses no place

    def shared_by(self, settings: Any, targets: Iterable[Sight]) -> dict[str, Shared]:
        kinds: dict[str, Kind] = {}
        for sight in targets:
            name, size = kind_of(sight.path), table(sight.view, sight.shape)[-1]
            if name in kinds and kinds[name].size != size:
                name = f"{name}_{size}"
            kinds.setdefault(name, Kind(size)).add(sight)
        made = places({name: kind.size for name, kind in kinds.items()}, settings)
        made.update((f"frod_V.{name}", V) for name, V in bases(kinds, settings))
        return {key: Shared(t, settings.save_projection) for key, t in made.items()}

    def build(self, site: Site) -> dict[str, Any]:
        *lead, _, size = table(site.view, site.view.shape(site.module))
        count = off_diagonal(size, site.settings.sparse_rate)
        return {
            "frod_dropout": site.dropout("frod_dropout"),
            "frod_lambda_l": nn.Parameter(torch.empty(*lead, size, **site.kwargs)),
            "frod_lambda_s_values": nn.Parameter(torch.zeros(*lead, count, **site.kwargs)),
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        self.derive(p, inner)
        p.frod_lambda_l.copy_(p.frod_lambda_0)
        if not p.settings.init_weights:
            p.frod_lambda_l.add_(torch.randn_like(p.frod_lambda_l), alpha=0.1)
            p.frod_lambda_s_values.normal_(0, 0.1)

    def derive(self, p: Adapter, inner: Stack) -> None:
        self.prepare(p)
        V, dtype = self.of_kind(p, "V"), p.frod_lambda_l.dtype
        if V.device.type != "meta":
            W = table(p.layer.view, p.original_weight())
            U, scale = left(W, V)
            p.layer.keep(p, "frod_U", U.to(V.dtype).to(W.device))
            p.layer.keep(p, "frod_lambda_0", scale.to(dtype).to(W.device))

    follow_base = derived_again

    def written(self, p: Adapter) -> None:
        if "category" not in p.__dict__:  # a file came first
            self.prepare(p)
        self.follow_base(p, p.layer.stack(()))

    def prepare(self, p: Adapter) -> None:
        name, size = kind_of(p.path), table(p.layer.view, p.layer.view.shape(p.layer.get_base_layer()))[-1]
        held = p.shared.get(f"frod_V.{name}")
        fits = held is not None and p.name in held._buffers and held.tensor(p.name).shape[-1] == size
        p.__dict__["category"] = name = name if fits else f"{name}_{size}"
        p.direct.update({f"frod_{what}": reference(p.shared[f"frod_{what}.{name}"], p.name) for what in SHARED})

    def of_kind(self, p: Adapter, what: str) -> Tensor:
        """V, or the places of S, that p's layer shares with others."""
        compiling = torch.compiler.is_dynamo_compiling()  # which finds no names with a dot in them
        return p.referred(f"frod_{what}") if compiling else p.shared[f"frod_{what}.{p.category}"].tensor(p.name)

    def moved(self, p: Adapter) -> Tensor:
        """l - l0."""
        return p.held("frod_lambda_l") - p.held_buffer("frod_lambda_0")

    def pieces(self, p: Adapter) -> tuple[Tensor, Tensor, Tensor]:
        """U (..., out, in), S + diag(l - l0) (..., in, in), and V."""
        U, values = p.held_buffer("frod_U"), p.held("frod_lambda_s_values")
        at, V = (self.of_kind(p, what).to(U.device) for what in SHARED)
        size = V.shape[-1]
        return U, scatter(values, at, (*values.shape[:-1], size, size)) + self.moved(p).diag_embed(), V

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        U, middle, V = self.pieces(p)
        if p.layer.view.infix:  # the table's rows are in-features
            X = V[rows].to(middle.dtype) @ middle.mT
            return torch.cat([X @ part.to(X.dtype).mT for part in U.split(max(1, PART // len(V)))], -1)
        U, V = U[..., rows, :].to(middle.dtype), V.to(middle.dtype)
        return (U @ middle) @ V.mT if U.shape[-2] <= len(V) else U @ (middle @ V.mT)  # a merge takes a few rows at once

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held = open_linear(inner, x) if type(self).onto is FRoD.onto and x.is_cpu and x.numel() else None
        values, U = p.held("frod_lambda_s_values"), p.held_buffer("frod_U")
        if held is None or torch.compiler.is_compiling() or U.dtype is not x.dtype:
            return None
        at, V = (self.of_kind(p, what).to(U.device) for what in SHARED)
        thin = inner.drop(x, self.drop_rate(p), V.dtype)[0].reshape(-1, x.shape[-1])
        z = (V.mT @ thin.mT).to(values.dtype)  # features first, for the sparse product
        t = sparse.product(values, z, sparse.places(p.cache, at, (len(V), len(V)))) + self.moved(p)[:, None] * z
        return onto.thin(x, *held, (t.mT.to(U.dtype), U.mT, 1.0))

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if not inner.view.dense:
            return super().onto(p, inner, y, x)
        U, middle, V = self.pieces(p)
        x, _ = inner.drop(x, self.drop_rate(p), V.dtype)
        return (y + F.linear(F.linear(x @ V, middle.to(V.dtype)), U)).to(y.dtype)
