"""BD-LoRA: one factor is block diagonal, so that the adapter can be split among devices as the weight is.

A weight that is split by in-features gets a block diagonal A, one that is split by out-features a block diagonal B: of
n blocks, block i maps slice i of the input to slice i of the output. Files hold the blocks below each other, A as
(r, in/n) and B as (out, r/n). Source: Wang et al. 2025, arXiv 2510.23346.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ...core.method import Site
from ...core.stack import Adapter, Stack
from ...core.views import linear_module
from .method import LoRA


class BDLoRA(LoRA):
    """W' = W + s B A, with B or A block diagonal."""

    def build(self, site: Site) -> dict[str, Any]:
        built = super().build(site)
        side, n = side_of(site.settings.use_bdlora, site.path), site.settings.use_bdlora.nblocks
        if side is not None:
            if not site.view.dense:
                raise ValueError(
                    f"use_bdlora splits linear layers, but {site.path!r} is a {site.view.label}. Leave it out "
                    "(`exclude_modules`), or out of the lists of BdLoraConfig with match_strict=False."
                )
            out, inp = site.view.shape(site.module)
            r = site.settings.r
            sizes = {"A": {"in-features": inp, "r": r}, "B": {"out-features": out, "r": r}}[side]
            wrong = [f"{size} {name}" for name, size in sizes.items() if size % n]
            if wrong:
                raise ValueError(
                    f"use_bdlora: nblocks={n} does not divide {' and '.join(wrong)} of {site.path!r}. Choose another "
                    "number of blocks or another rank."
                )
            if side == "A":
                built["lora_A"] = linear_module(inp // n, r, **site.kwargs)
            else:
                built["lora_B"] = linear_module(r // n, out, bool(site.settings.lora_bias), **site.kwargs)
        return {**built, "blocks": n, "blocked": side}

    def init(self, p: Adapter, inner: Stack) -> None:
        super().init(p, inner)
        if p.blocked == "A" and p.settings.init_lora_weights is True:
            bound = math.sqrt(6 / p.lora_A.weight.shape[1])  # Kaiming's for a = 0
            p.lora_A.weight.uniform_(-bound, bound)

    def prepare(self, p: Adapter) -> None:
        super().prepare(p)
        p.hot = None if p.blocked else p.hot

    def own_factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        A, B = super().own_factors(p)
        side, n = p.__dict__["blocked"], p.__dict__["blocks"]
        return (spread(A, n) if side == "A" else A), (spread(B, n) if side == "B" else B)

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        # a blocked module alone maps a slice, so that it cannot be called for the whole
        return super(LoRA, self).onto(p, inner, y, x) if p.blocked else super().onto(p, inner, y, x)


def spread(M: Tensor, n: int) -> Tensor:
    """The block diagonal matrix of the n blocks that M holds below each other."""
    rows, cols = M.shape[0] // n, M.shape[1]
    blocks = M.view(n, rows, 1, cols)
    eye = M.new_ones(n).diag().view(n, 1, n, 1)
    return (blocks * eye).reshape(n * rows, n * cols)


def side_of(options: Any, path: str) -> str | None:
    """Which factor of a layer is block diagonal: "A", "B" or None; entries are parts of the layer's name.

    Raises ValueError if both are, or none with `match_strict`.
    """
    found = {
        side: [entry for entry in getattr(options, f"target_modules_bd_{side.lower()}") or () if entry in path]
        for side in "AB"
    }
    if found["A"] and found["B"]:
        raise ValueError(
            f"BdLoraConfig: {path!r} is in both lists, by {found['A'][0]!r} and {found['B'][0]!r}. Only one factor can "
            "be block diagonal; make the entries longer."
        )
    if not (found["A"] or found["B"]) and options.match_strict:
        raise ValueError(
            f"BdLoraConfig: {path!r} is in neither target_modules_bd_a nor target_modules_bd_b. Add it, or set "
            "match_strict=False to give it a plain LoRA."
        )
    return next((side for side in "AB" if found[side]), None)
