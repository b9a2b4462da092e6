"""The prompts of a batch whose samples have different adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.call import BASE
from .encoder import BasePromptEncoder

ALIKE = ("caches", "in_decoder", "num_virtual_tokens", "rows", "heads", "layers", "stride")
PAST_PADDING = "create_position_ids_from_inputs_embeds"
BY_MASK = frozenset({"opt"})  # they count positions by the mask where none are given
NO_POSITIONS = frozenset({"t5", "mt5", "umt5", "longt5", "bloom"})  # they know distances, or read the mask


class Mixed:
    """Stands in the place of one encoder. Samples without an adapter have tokens that nobody attends to.

    Arguments:
        names: the adapter of each sample, or `"__base__"`; they exist.
        encoders: of the model, by adapter.

    Raises ValueError for prompts that differ in more than their values.
    """

    own_loss = False
    caches: bool
    num_virtual_tokens: int

    def __init__(self, names: Sequence[str], encoders: Mapping[str, Any]) -> None:
        self.names = list(names)
        self.of: dict[str, BasePromptEncoder] = {n: encoders[n] for n in dict.fromkeys(names) if n != BASE}
        first = next(iter(self.of.values()))
        for name, other in self.of.items():
            differ = [a for a in ALIKE if getattr(other, a, None) != getattr(first, a, None)]
            if differ:
                raise ValueError(
                    f"adapter_names: the prompt of {name!r} differs from the others in {', '.join(differ)}."
                )
        self.by_task = any(e.by_task for e in self.of.values())
        self.__dict__.update({a: getattr(first, a, None) for a in ALIKE})

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all the encoders."""
        for encoder in self.of.values():
            yield from encoder.parameters()

    def prompt(self, batch: int, task_ids: Tensor | None = None) -> Tensor:
        """The prompt of each sample, (batch, tokens, size); the names may be repeated for beams."""
        repeat = self._repeat(batch)
        names = [n for n in self.names for _ in range(repeat)]
        parts, index = [], []
        for name, encoder in self.of.items():
            rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=next(encoder.parameters()).device)
            parts.append(
                encoder.prompt(len(rows), task_ids[rows] if encoder.by_task and task_ids is not None else None)
            )
            index.append(rows)
        found = torch.cat(parts)
        whole = found.new_zeros(batch, *found.shape[1:])
        return whole.index_copy(0, torch.cat(index), found)

    def _repeat(self, batch: int) -> int:
        if not self.names or batch % len(self.names):
            raise ValueError(f"adapter_names has {len(self.names)} entries, but the batch has {batch} samples.")
        return batch // len(self.names)

    def absent(self, device: Any) -> Tensor:
        """Which samples have no adapter, (samples,) bool."""
        return torch.tensor([n == BASE for n in self.names], device=device)


def hide(model: nn.Module, encoder: Any, out: dict[str, Any], mask: str, generating: bool = False) -> dict[str, Any]:
    """The arguments with the tokens of samples without an adapter masked out, and their texts' positions from zero on.

    Arguments:
        model: the base model.
        encoder: what made the prompt.
        out: the arguments, prompt included.
        mask: the name of the mask that counts the virtual tokens.
        generating: positions are made from the mask later.

    Raises ValueError if the model's positions cannot be set.
    """
    if not isinstance(encoder, Mixed) or BASE not in encoder.names:
        return out
    k = encoder.num_virtual_tokens
    text = next(out[n] for n in ("inputs_embeds", "input_ids") if out.get(n) is not None)
    batch, length = text.shape[:2]
    total = length + (k if encoder.caches else 0)
    absent = encoder.absent(text.device)
    seen = out.get(mask)
    seen = torch.ones(batch, total, dtype=torch.long, device=text.device) if seen is None else seen.clone()
    seen[absent, :k] = 0
    out = {**out, mask: seen}
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if not takes and getattr(model.config, "model_type", "") not in NO_POSITIONS:
        raise ValueError(
            f"adapter_names: {type(model).__name__} takes no position_ids, so samples with {BASE!r} cannot stand in a "
            "batch with prompts. Run them apart."
        )
    if takes and not generating:
        places, first = out.get("position_ids"), 0
        if places is None and getattr(model.config, "model_type", "") in BY_MASK:
            return out
        if places is None:
            first = first_place(model)
            places = torch.arange(first, first + total, device=text.device)[total - length :].expand(batch, -1)
        out["position_ids"] = torch.where(absent[:, None], (places - k).clamp_min(first), places)
    return out


def first_place(model: nn.Module) -> int:
    """The position of a text's first token: behind that of padding in models made as RoBERTa is."""
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return padding + 1 if isinstance(padding, int) and hasattr(embeddings, PAST_PADDING) else 0


def hide_decoder(encoder: Any, out: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the tokens in front of a decoder's text masked out for samples without an adapter."""
    if not isinstance(encoder, Mixed) or BASE not in encoder.names:
        return out
    text, seen = out["decoder_inputs_embeds"], out.get("decoder_attention_mask")
    seen = torch.ones(text.shape[:2], dtype=torch.long, device=text.device) if seen is None else seen.clone()
    seen[encoder.absent(text.device), : encoder.num_virtual_tokens] = 0
    return {**out, "decoder_attention_mask": seen}
