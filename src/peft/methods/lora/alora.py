"""Activated LoRA: the adapter acts from the last occurrence of its invocation tokens on.

    y_t = W x_t                   before the invocation
    y_t = W x_t + s B A x_t       from its first token on

so that what the base model has computed for the text before, its keys and values among them, stays valid. Where the
update starts in each row is found in the model's `input_ids` before every forward (`Offsets`), whoever calls it; in
generation the cached part keeps what was found for it. Source: Greenewald et al. 2025, arXiv 2504.12397.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.method import Site
from ...core.stack import Adapter, Stack
from ...errors import PeftWarning
from .method import LoRA


def last_offsets(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """How many tokens of each row there are from the last occurrence of `tokens` on, (rows,); 0 where there is none."""
    n, length = len(tokens), ids.shape[1]
    if length < n:
        return ids.new_zeros(len(ids))
    windows = ids.unfold(1, n, 1)
    starts = (windows == torch.tensor(list(tokens), device=ids.device)).all(-1)
    return torch.where(starts, length - torch.arange(length - n + 1, device=ids.device), length + 1).amin(1) % (
        length + 1
    )


class Offsets:
    """Stands before a model's forward: finds where each row's adapter starts, and keeps it in the call's record.

    Arguments:
        tuner: whose configurations and call are looked at.
    """

    def __init__(self, tuner: Any):
        self.tuner: Any = tuner
        self.found: dict[str, Tensor] = {}
        self.last_given: Any = None
        self.length = 0  # of the rows that given offsets are counted from the end of
        self.start = 0  # of the running forward, see `Call.begin`

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        configs = self.tuner.peft_config.items()
        tokens = {n: c.alora_invocation_tokens for n, c in configs if getattr(c, "alora_invocation_tokens", None)}
        ids = kwargs.get("input_ids", args[0] if args else None)
        call = self.tuner.call
        self.start = call.begin()
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
            ids = _of_embeddings(call.ids, kwargs.get("inputs_embeds"))
        cached = max(0, _cached(kwargs.get("past_key_values")) - call.virtual)  # of the text
        if call.given_offsets is not None:
            call.offsets = self._given(tokens, call.given_offsets, ids, cached)
        elif ids is None:
            call.offsets = None
            if any(n in tokens for n in self.tuner.active_adapters):
                text = "aLoRA needs `input_ids` to find its invocation tokens; without them the adapter does nothing."
                warnings.warn(text, PeftWarning, stacklevel=2)
        else:
            before = self.found if cached else {}
            call.offsets = self.found = {n: _of_rows(ids, t, before.get(n)) for n, t in tokens.items()}

    def _given(self, names: Iterable[str], offsets: Any, ids: Tensor | None, cached: int) -> dict[str, Tensor]:
        """What the caller says, for rows that may have grown and been repeated since."""
        length = cached + (0 if ids is None else ids.shape[1])
        if not cached and offsets is not self.last_given:
            self.length, self.last_given = length, offsets
        rows = torch.tensor([o or 0 for o in offsets], device=None if ids is None else ids.device)
        rows = rows if ids is None else rows.repeat_interleave(max(1, len(ids) // max(1, len(offsets))))
        rows = torch.where(rows > 0, rows + max(0, length - self.length), rows)
        return {name: rows for name in names}

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Keep what was found for parts of the forward that are computed again in the backward pass."""
        self.tuner.call.remember(self.start)


def _cached(past: Any) -> int:
    return int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0


def _of_embeddings(ids: Tensor | None, embeddings: Tensor | None) -> Tensor | None:
    """The ids of a text that stands last among embeddings, for rows that may be repeated."""
    if ids is None or embeddings is None:
        return None
    return ids.repeat_interleave(max(1, len(embeddings) // max(1, len(ids))), 0)


def _of_rows(ids: Tensor, tokens: list[int], before: Tensor | None) -> Tensor:
    """The offset of each row; a row that goes on after what is cached keeps acting."""
    found = last_offsets(ids, tokens)
    if before is None or len(before) != len(found):
        return found
    return torch.where(found > 0, found, torch.where(before > 0, before.to(found) + ids.shape[1], 0))


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
        h = F.linear(F.dropout(x.to(A.dtype), self.drop_rate(p)), A)
        update = F.linear(torch.where(acting, h, 0.0), B)
        extra = self.up_bias(p)
        update = update if extra is None else update + extra * acting
        return (y + update * p.scaling).to(y.dtype)

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
        rows, length = x.shape[0], (x.shape[1] if x.dim() > 2 else 1)
        if len(offsets) != rows:
            raise ValueError(
                f"aLoRA: the layer {p.path!r} got {rows} rows, but there are {len(offsets)} offsets, one for each row "
                "of the batch. Leave layers that regroup rows out (`exclude_modules`)."
            )
        offsets = offsets.to(x.device)[:, None]
        if x.dim() == 2:
            return offsets > 0
        place = torch.arange(length, device=x.device)
        return (place >= length - offsets).view(rows, length, *[1] * (x.dim() - 2))
