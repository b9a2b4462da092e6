"""Several active prompts as one, and the prompts of a call: tokens in front, and keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.call import BASE
from .encoder import BasePromptEncoder
from .mixed import Mixed


class Chosen(NamedTuple):
    """The prompts of a call, each an encoder, several as one (`Joined`, `Mixed`), or None."""

    front: Any = None
    cached: Any = None

    @property
    def tokens(self) -> int:
        """How many virtual tokens there are."""
        return sum(e.num_virtual_tokens for e in self if e is not None)

    @property
    def own_loss(self) -> Any:
        """The encoder whose loss takes the place of the model's own, and the numbers of other tokens around its own.

        Raises ValueError if there are several.
        """
        found, before, after = None, 0, 0
        for part in getattr(self.front, "parts", [self.front] if self.front is not None else []):
            if part.own_loss and found is not None:
                raise ValueError(
                    "labels: two active prompts have a loss of their own each (CPT). Train one at a time: activate the "
                    "other behind it for inference only."
                )
            if part.own_loss:
                found = part
            elif found is None:
                before += part.num_virtual_tokens
            else:
                after += part.num_virtual_tokens
        return None if found is None else (found, (before, after))


class Joined:
    """Stands in the place of one encoder: the prompts of several, one behind the other.

    Arguments:
        parts: the encoders in the order of activation, all in front of the text or all keys and values.
    """

    own_loss = False

    def __init__(self, parts: Sequence[BasePromptEncoder]) -> None:
        self.parts = list(parts)
        first = self.parts[0]
        self.caches, self.by_task = first.caches, any(e.by_task for e in parts)
        self.in_decoder = any(e.in_decoder for e in parts)
        self.num_virtual_tokens = sum(e.num_virtual_tokens for e in parts)
        self.words = [w for e in parts for w in e.words or [None] * e.num_virtual_tokens]
        if first.caches:
            self.heads, self.layers, self.stride = first.heads, first.layers, first.stride

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all the encoders."""
        for part in self.parts:
            yield from part.parameters()

    def prompt(self, batch: int, task_ids: Tensor | None = None) -> Tensor:
        """The prompt of each sample, (batch, tokens, size); what is for a decoder's text comes last."""
        made = [(e, e.prompt(batch, task_ids if e.by_task else None)) for e in self.parts]
        decoder = [m[:, e.num_virtual_tokens :] for e, m in made if e.in_decoder and not e.caches]
        return torch.cat([*(m[:, : e.num_virtual_tokens] for e, m in made), *decoder], 1)


def active(names: Sequence[str], encoders: Mapping[str, Any]) -> Chosen:
    """The prompts that are active, for every sample."""

    def one(caches: bool) -> Any:
        parts = [encoders[n] for n in names if encoders[n].caches is caches]
        return Joined(parts) if len(parts) > 1 else next(iter(parts), None)

    return Chosen(one(False), one(True))


def of_samples(names: Sequence[str], encoders: Mapping[str, Any]) -> Chosen:
    """The prompts of samples of which each has an adapter of its own, of any method."""

    def one(caches: bool) -> Any:
        mine = [n if n in encoders and encoders[n].caches is caches else BASE for n in names]
        return None if all(n == BASE for n in mine) else Mixed(mine, encoders)

    return Chosen(one(False), one(True))
