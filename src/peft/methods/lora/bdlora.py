"""BD-LoRA: one factor is block diagonal, so that the adapter can be split among devices as the weight is.

A weight that is split by in-features gets a block diagonal A, one that is split by out-features a block diagonal B: of
n blocks, block i maps slice i of the input to slice i of the output. Files hold the blocks below each other, A as
(r, in/n) and B as (out, r/n). On any layout: in-features are a convolution's channels, an embedding's tokens, and each
expert's own; beside groups a blocked B has lcm(n, groups) blocks. Source: Wang et al. 2025, arXiv 2510.23346.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ...core.method import Site
from ...core.stack import Adapter, Stack
from .method import LoRA


class BDLoRA(LoRA):
    """W' = W + s B A, with B or A block diagonal."""

    def build(self, site: Site) -> dict[str, Any]:
        view, m, c = site.view, site.module, site.settings
        side, n = side_of(c.use_bdlora, site.path), c.use_bdlora.nblocks
        _check(site, side, n)
        built = super().build(site)
        if side == "A":
            built[f"lora_{view.infix}A"] = view.down(m, c.r, blocks=n, **site.kwargs)
        elif side == "B":
            built[f"lora_{view.infix}B"] = view.up(m, c.r, bool(c.lora_bias), n, **site.kwargs)
        return {**built, "blocks": n, "blocked": side}

    def init(self, p: Adapter, inner: Stack) -> None:
        super().init(p, inner)
        if p.blocked == "A" and p.settings.init_lora_weights is True and not inner.view.infix:
            bound = math.sqrt(6 / p.lora_A.weight[0].numel())  # Kaiming's for a = 0
            p.lora_A.weight.uniform_(-bound, bound)

    def prepare(self, p: Adapter) -> None:
        super().prepare(p)
        p.hot = None if p.blocked else p.hot

    def own_factors(self, p: Adapter, blocks: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
        side, n = p.__dict__["blocked"], p.__dict__["blocks"]
        return super().own_factors(p, (n if side == "A" else 1, n if side == "B" else 1))

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        # a blocked module alone maps a slice, so that it cannot be called for the whole
        return super(LoRA, self).onto(p, inner, y, x) if p.blocked else super().onto(p, inner, y, x)


def _check(site: Site, side: str | None, n: int) -> None:
    """Raise ValueError for sizes that the blocks do not divide."""
    view, m, r = site.view, site.module, site.settings.r
    groups = view.groups(m)
    if side is None:
        return
    name, size = ("in-features", view.inputs(m)) if side == "A" else ("out-features", view.shape(m)[-2])
    n = n if side == "A" else math.lcm(n, groups)  # B is as many blocks as there are groups already
    wrong = [f"{size} {what}" for what, size in ((name, size), ("r", r)) if size % n]
    if wrong:
        beside = f" (of which {groups} groups make {n})" if side == "B" and groups > 1 else ""
        raise ValueError(
            f"use_bdlora: nblocks={site.settings.use_bdlora.nblocks}{beside} does not divide {' and '.join(wrong)} of "
            f"{site.path!r}. Choose another number of blocks or another rank."
        )


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
