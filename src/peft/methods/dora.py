"""DoRA: magnitude and direction of a weight, learnt apart, over any additive method.

    W' = m V / |V|,   V = W + delta,   |V| the norm of each row, a constant of the gradient;  m starts at |W|

V is taken over the base weight and this adapter's delta alone, so the gain m / |V| does not depend on other adapters.
A bias that the method adds stays outside: b' = b + beta, which the magnitude does not scale. Where training draws parts
of the delta by chance, |V| is of the delta as it is merged. For a low-rank delta it is never taken of a dense product:

    |V_o|^2 = |W_o|^2 + 2 s (W A')_o . B_o + s^2 B_o (A A') B_o'

with |W_o|^2 kept between forwards. Source: Liu et al. 2024, arXiv 2402.09353, eq. 5 and section 4.3.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..core.direct import open_linear
from ..core.folding import Fold, directed
from ..core.kept import kept, still
from ..core.method import Delta, LowRank, Site
from ..core.stack import Adapter, Stack
from ..kernels import scaled
from ..kernels.modes import NARROW, WIDE, ungraded
from .lora.row import Gained, Row
from .magnitude import Gaining, Magnitude

SAME = (  # what it says and does as the method inside
    *("shared", "shared_by", "form", "free", "drawn", "rest", "prepare", "tie", "follow_base", "rowwise", "by_modules"),
    *("takes", "fitted", "roomy", "window", "for_file", "split", "parts", "join", "written", "copies", "may_be_empty"),
    *("reads", "whole", "direct", "mergeable", "refuse_merge", "drop_rate", "bias"),
)


class DoRA(Gaining):
    """W' = m V / |V| around the additive method `of`."""

    additive = False

    def __init__(self, of: Delta):
        self.of = of
        for name in SAME:
            setattr(self, name, getattr(of, name))
        if isinstance(of, LowRank) and of.runner is Row:
            self.runner, self.by_row = Gained, of.by_row  # type: ignore[misc,attr-defined]

    def build(self, site: Site) -> dict[str, Any]:
        out = site.view.shape(site.module)[:-1]
        m = torch.empty(out, **site.kwargs)
        shaped = m if len(out) > 1 else site.view.vector(site.module, m)
        return {
            **self.of.build(site),
            "lora_magnitude_vector": Magnitude(nn.Parameter(shaped), site.view.label),
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        self.of.init(p, inner)

    def derive(self, p: Adapter, inner: Stack) -> None:
        self.of.derive(p, inner)
        m = p.lora_magnitude_vector.weight
        if m.device.type != "meta":
            m.copy_(self.norm(p).view(m.shape))

    def checkpoint_key(self, key: str) -> str:
        return "lora_magnitude_vector" if key == "lora_magnitude_vector.weight" else self.of.checkpoint_key(key)

    @ungraded
    def norm(self, p: Adapter, rows: slice = slice(None)) -> Tensor:
        """|V| of each row, (..., rows), in float32, or float64 of such a weight."""
        W = p.original_weight()
        wide = torch.float64 if W.dtype is torch.float64 else torch.float32
        if not isinstance(self.of, LowRank):
            return torch.cat([torch.linalg.vector_norm(V.to(wide), dim=-1) for V in self._rows(p, W)], -1)[..., rows]
        (A, B), s = (t.to(wide) for t in self.of.factors(p)), self.of.scaling(p)
        base = p.layer.get_base_layer()
        special = p.layer.view.norm_product(base, A, B) if self.of.whole else None
        if special is not None:
            return torch.linalg.vector_norm(base.weight.to(wide).flatten(1) + s * special, dim=-1)[rows]
        base_square = self.base_square(p, W, rows)
        W, B = (W, B) if rows == slice(None) else (W[..., rows, :], B[..., rows, :])
        return scaled.norms(W, base_square, A, B, s)

    def _rows(self, p: Adapter, W: Tensor) -> list[Tensor]:
        if not self.of.rowwise(p):
            return [self.of.weight(p, W)]
        start = itertools.accumulate((w.shape[-2] for w in scaled.tiles(W)), initial=0)
        return [self.of.weight(p, w, slice(s, s + w.shape[-2])) for w, s in zip(scaled.tiles(W), start, strict=False)]

    def gain(self, p: Adapter, rows: slice = slice(None)) -> Tensor:
        """m / |V|, (..., rows); where a row of V is zero its direction does not matter."""
        return self.magnitude(p)[..., rows] / self.safe_norm(p, rows)

    def safe_norm(self, p: Adapter, rows: slice = slice(None)) -> Tensor:
        """|V| with 1 in place of 0."""
        return torch.where((n := self.norm(p, rows).detach()) == 0, 1.0, n)  # from the tangents of forward mode, too

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        return self.of.delta(p, W, rows)

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        gain = self.gain(p, rows)[..., None]
        return ((W + self.of.delta(p, W, rows)) * gain).to(W.dtype)

    def fold(self, p: Adapter, wide: torch.dtype, original: bool) -> Fold | None:
        return directed(self.of.fold(p, wide, original) if original else None, p.layer.view, self.magnitude(p), wide)

    def live_weight(self, p: Adapter, W: Tensor) -> Tensor:
        V = self.of.live_weight(p, W) if W.dtype in WIDE else W + self.of.read_delta(p, W)
        return scaled.by_rows(V, self.kept_gain(p)).to(W.dtype)

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held, gradients = open_linear(inner, x), torch.is_grad_enabled()
        if held is None or (gradients and held[0].requires_grad) or (of := self._thin(p)) is None:
            return None
        rate, narrow = of.drop_rate(p), x.dtype in NARROW
        found = None if gradients or rate else still(p)
        if found is not None and (narrow or found[0].dtype is x.dtype):
            return scaled.evaluated(x, *held, *found)
        (A, B), m, s = of.factors(p), self.magnitude(p), of.scaling(p)
        exact = m.dtype is A.dtype is x.dtype and m.dtype in WIDE
        if not exact and (not narrow or gradients or rate):
            return None
        if gradients or rate:
            y = scaled.normed(x, *held, A, B, s, rate, m, lambda: self.squares_now(p, held[0])) if gradients else None
            return scaled.linear(x, *held, A, B, s, rate, m, self.safe_norm(p).to(m.dtype)) if y is None else y
        return scaled.evaluated(x, *held, *kept(p, lambda: self.folded(p, of, A, B), base=True))

    def _thin(self, p: Adapter, biased: bool = False) -> LowRank | None:
        """The method inside, if its update is computed from factors and adds no bias, or may do so."""
        of = self.of
        thin = isinstance(of, LowRank) and of.direct and (biased or of.up_bias(p) is None) and not of.by_modules(p)
        return of if thin else None  # type: ignore[return-value]

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        b = self.of.bias(p, inner.bias())
        if inner.view.dense and (of := self._thin(p)) is not None:
            rate = self.drop_rate(p)
            if not rate and (z := self.evaluated(p, of, inner, y, x, b)) is not None:
                return z
            (A, B), s = of.factors(p), of.scaling(p)
            again = inner if inner.last is None else None
            return scaled.add(y, x, A, B, s, rate, self.magnitude(p), self.safe_norm(p), b, again)
        z = self.of.onto(p, inner, y, x)  # before the gain, as hooks on modules may renew the factors
        gain = self.kept_gain(p)
        g = inner.spread(gain)
        # b' in full: what `of` adds to y has its own bias in it
        return (z * g).to(y.dtype) if b is None else scaled.product(z, g, inner.spread(b - b * gain)).to(y.dtype)
