"""MiSS in its form `init_weights="bat"`, which mixes the base weight in; `miss` states both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Method, Site
from ..core.stack import Adapter, Stack


def build(site: Site, *shape: int) -> dict[str, Any]:
    """The tensors of a target; `shape` is that of a block."""
    c = site.settings
    drop = nn.Identity() if c.init_weights == "bat" else site.dropout("miss_dropout")
    block = nn.Parameter(torch.empty(*site.view.shape(site.module)[:-2], *shape, **site.kwargs))
    return {"miss_dropout": drop, "miss_block": block, "miss_r": c.r, "miss_mini_r": c.mini_r, "scaling": 1.0}


def refuse(site: Site, name: str, value: int, **sizes: int) -> None:
    """Raise ValueError if a size does not divide the features."""
    for what, n in sizes.items():
        if n % value:
            raise ValueError(
                f"{name}={value} must divide the {what}-features ({n}) of {site.path!r} with "
                f"init_weights={site.settings.init_weights!r}. Use one of {[d for d in range(1, n + 1) if n % d == 0]}."
            )


class Bat(Method):
    """W'_uv = W_uv + W_uv D_u + D_u in blocks of r x r."""

    by_rows = False

    def build(self, site: Site) -> dict[str, Any]:
        *_, out, inp = site.view.shape(site.module)
        r = site.settings.r
        refuse(site, "r", r, **{"in": inp, "out": out})
        return build(site, out // r, r, r)

    def init(self, p: Adapter, inner: Stack) -> None:
        p.miss_block.zero_()

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        D = p.held("miss_block") * p.scaling
        blocks = W.to(D.dtype).unflatten(-2, (-1, p.miss_r)).unflatten(-1, (-1, p.miss_r))  # (..., u, a, v, b)
        mixed = blocks + torch.einsum("...uavb,...ubc->...uavc", blocks, D) + D.unsqueeze(-2)
        return mixed.flatten(-2).flatten(-3, -2).to(W.dtype)
