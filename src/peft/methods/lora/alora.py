"""Activated LoRA: the adapter acts from the last occurrence of its invocation tokens on.

    y_t = W x_t                   before the invocation
    y_t = W x_t + s B A x_t       from its first token on

so that what the base model has computed for the text before, its keys and values among them, stays valid. Where the
update starts in each row is found in the model's `input_ids` before every forward (`offsets.Offsets`), whoever calls
it; in generation the cached part keeps what was found for it. Source: Greenewald et al. 2025, arXiv 2504.12397.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.method import Site
from ...core.stack import Adapter, Stack
from .method import LoRA
from .offsets import positions


class ALoRA(LoRA):
    """W' = W + s B A on the last positions of each row; there is no one W', so nothing can be merged."""

    additive = False
    mergeable = False
    some_positions = True

    @property
    def everywhere(self) -> LoRA:
        """LoRA."""
        return LoRA()

    def build(self, site: Site) -> dict[str, Any]:
        if not site.view.dense:
            raise ValueError(
                f"alora_invocation_tokens adapts linear layers, whose input has a position for each token, but "
                f"{site.path!r} is a {site.view.label}. Leave it out (`exclude_modules`)."
            )
        return super().build(site)

    def refuse_merge(self, p: Adapter) -> None:
        raise NotImplementedError(
            f"The adapter {p.name!r} is an aLoRA: it acts on some tokens only, so it cannot be merged. Keep it apart."
        )

    def prepare(self, p: Adapter) -> None:
        p.hot = None

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        acting = self.acting(p, x)
        if acting is None:
            return y
        A, B = self.factors(p)
        rate, x = self.drop_rate(p), x.to(A.dtype)
        h = F.linear(F.dropout(x, rate) if rate else x, A)
        update = F.linear(torch.where(acting, h * p.scaling, 0.0), B)
        extra = self.up_bias(p)
        update = update if extra is None else update + extra * acting * p.scaling
        return (y + update).to(y.dtype)

    def acting(self, p: Adapter, x: Tensor) -> Tensor | None:
        """Which positions of x (rows, tokens, features) the adapter acts on, (rows, tokens, 1); None for none."""
        call = p.layer.call
        found, names = call.fact("offsets"), call.fact("names")
        offsets = None if found is None else found.get(p.name)
        if offsets is None:
            return None
        if names is not None:
            repeat = len(offsets) // len(names)
            mine = [name == p.name for name in names for _ in range(repeat)]
            offsets = offsets[torch.tensor(mine, device=offsets.device)]
        if len(offsets) != len(x):
            raise ValueError(
                f"aLoRA: the layer {p.path!r} got {len(x)} rows, but there are {len(offsets)} offsets, one for each "
                "row of the batch. Leave layers that regroup rows out (`exclude_modules`)."
            )
        if names is None and not torch.compiler.is_compiling():
            return found.mask(p.name, x)
        return positions(offsets, x)
