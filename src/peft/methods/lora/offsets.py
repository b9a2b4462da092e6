"""Where the update of activated LoRA starts in each row of a batch: found once for each forward."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.past import past_in
from ...errors import PeftWarning


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


class Found(dict[str, Tensor]):
    """The offsets of each adapter in one forward, with what layers make of them, which is the same for all of them."""

    def __init__(self, offsets: dict[str, Tensor]):
        super().__init__(offsets)
        self.masks: dict[Any, Tensor | None] = {}

    def mask(self, name: str, x: Tensor) -> Tensor | None:
        """Which positions of x an adapter acts on; None for none at all, where finding out waits for no device."""
        key = (name, x.shape[1:-1], x.device)
        if key not in self.masks:
            offsets = self[name]
            nobody = offsets.device.type == "cpu" and not torch.is_grad_enabled() and not offsets.any()
            self.masks[key] = None if nobody else positions(offsets, x)
        return self.masks[key]


def positions(offsets: Tensor, x: Tensor) -> Tensor:
    """Which positions of x (rows, tokens, ..., features) lie in the last ones of each row, (rows, tokens, ..., 1)."""
    offsets = offsets.to(x.device)[:, None]
    if x.dim() == 2:
        return offsets > 0
    rows, length = x.shape[:2]
    place = torch.arange(length, device=x.device)
    return (place >= length - offsets).view(rows, length, *[1] * (x.dim() - 2))


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
        cached = max(0, _cached(past_in(kwargs)) - call.virtual)  # of the text
        if call.given_offsets is not None:
            call.offsets = self._given(tokens, call.given_offsets, ids, cached)
        elif ids is None:
            call.offsets = None
            if any(n in tokens for n in self.tuner.active_adapters):
                text = "aLoRA needs `input_ids` to find its invocation tokens; without them the adapter does nothing."
                warnings.warn(text, PeftWarning, stacklevel=2)
        else:
            before = self.found if cached else {}
            call.offsets = self.found = Found({n: _of_rows(ids, t, before.get(n)) for n, t in tokens.items()})

    def _given(self, names: Iterable[str], offsets: Any, ids: Tensor | None, cached: int) -> dict[str, Tensor]:
        """What the caller says, for rows that may have grown and been repeated since."""
        length = cached + (0 if ids is None else ids.shape[1])
        if not cached and offsets is not self.last_given:
            self.length, self.last_given = length, offsets
        rows = torch.tensor([o or 0 for o in offsets], device="cpu" if ids is None else ids.device)
        rows = rows if ids is None else rows.repeat_interleave(max(1, len(ids) // max(1, len(offsets))))
        rows = torch.where(rows > 0, rows + max(0, length - self.length), rows)
        return Found(dict.fromkeys(names, rows))

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
