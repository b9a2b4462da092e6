"""Texts that are padded on the left: each has the prompt right before it, as it would have alone.

k is the number of virtual tokens, p that of padding before a sample's text. In front of the text: the columns are
[p padding, k virtual, text], not [k virtual, p padding, text], in which the padding would stand between the two, and
take up positions and the windows of layers that look back a number of columns. The text's columns are the same. As keys
and values the prompt stays in front of all: there positions are counted without the padding.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PeftWarning, report
from ..kernels.modes import transformed
from .fitting import text_config
from .mixed import BY_MASK, Mixed, first_place

if TYPE_CHECKING:
    from .encoder import BasePromptEncoder


def before_text(mask: Any, encoder: Any = None) -> Tensor | None:
    """(batch, 1), how much padding is before each text; None where there is none.

    In graphs that is not looked at, nor on a device, for which the host would wait.

    Arguments:
        mask: (batch, n), or something else, which tells nothing.
        encoder: of a mixed batch, whose samples without a prompt count as not padded.
    """
    if type(mask) is not Tensor or mask.ndim != 2 or mask.shape[1] < 2:
        return None
    if mask.is_cpu and not transformed() and bool(mask[:, 0].all()):
        return None
    count = (mask != 0).cumsum(-1).eq(0).sum(-1, keepdim=True)
    count = torch.where(count == mask.shape[1], 0, count)  # of a sample that is all padding nothing is looked at
    if isinstance(encoder, Mixed):
        absent = encoder.absent(mask.device)
        count = torch.where(absent.repeat_interleave(len(count) // len(absent))[:, None], 0, count)
    return count


def moved_behind(values: Tensor, padding: Tensor, k: int) -> Tensor:
    """(batch, k + n, ...) of k virtual tokens and a text, with them between its padding and its words."""
    columns = torch.arange(values.shape[1], device=values.device)
    p = padding.to(values.device)
    source = torch.where(columns < p, columns + k, torch.where(columns < p + k, columns - p, columns))
    return values.take_along_dim(source.view(*source.shape, *[1] * (values.dim() - 2)), 1)


def arranged(given: dict[str, Any], encoder: BasePromptEncoder | Any, out: dict[str, Any]) -> dict[str, Any]:
    """Arguments with k virtual tokens in front, with the prompt right before each text.

    Arguments:
        given: the arguments before, which tell the padding.
        encoder: of the prompt.
        out: the arguments with the prompt in front of all.
    """
    padding = before_text(given.get("attention_mask"), encoder)
    if padding is None:
        return out
    names = ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "per_layer_inputs")
    k = encoder.num_virtual_tokens
    ours = {n: out[n] for n in names if isinstance(out.get(n), Tensor) and out[n].shape[0] == len(padding)}
    return {**out, **{n: moved_behind(v, padding, k) for n, v in ours.items() if v.dim() > 1}}


def as_in_front(logits: Tensor, mask: Any, encoder: Any) -> Tensor:
    """(batch, k + n, words) in the order [k virtual, p padding, text], each before the token that it foretells."""
    padding, k = before_text(mask, encoder), encoder.num_virtual_tokens
    if padding is None:
        return logits
    columns = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    p = padding.to(logits.device)
    place = torch.where(columns < k, columns + p, torch.where(columns < k + p, columns - k, columns))
    return logits.take_along_dim((place - 1).clamp(min=0)[..., None], 1)


def counted(model: nn.Module, encoder: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with positions that leave padding on the left out, for prompts that are keys and values."""
    padding = before_text(given["attention_mask"], encoder)
    if padding is None:
        return given
    tell_of_windows(model, encoder, given)
    own = getattr(model.config, "model_type", "") in BY_MASK or hasattr(model, "get_rope_index") or first_place(model)
    if own or given.get("position_ids") is not None:
        return given
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return given
    columns = torch.arange(given["attention_mask"].shape[1], device=padding.device)
    return {**given, "position_ids": (columns - padding).clamp(min=0)}


def windowed(model: nn.Module) -> int:
    """How many columns layers of the model look back, the fewest of them; 0 if all look back to the first."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) is False or (kinds and "sliding_attention" not in kinds):
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


def tell_of_windows(model: nn.Module, encoder: Any, given: dict[str, Any], new: int = 0) -> None:
    """Warn where keys of a prompt are out of sight for texts that are padded, and would be in it for each alone.

    `new` tokens are to follow.
    """
    padding = before_text(given.get("attention_mask"), encoder)
    window = 0 if padding is None or transformed() else windowed(model)
    reach = encoder.num_virtual_tokens + given["attention_mask"].shape[1] + new if window else 0
    if reach > window and padding is not None and bool(padding.any()):
        text = (
            f"Layers of {type(model).__name__} look back {window} tokens, padding on the left among them, so that the "
            "padded texts of this batch see less of the prompt than each alone. Pad on the right, or run texts of "
            "one length together."
        )
        report(PeftWarning, text, strict=False, stacklevel=6)
