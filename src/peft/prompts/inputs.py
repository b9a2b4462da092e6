"""How a prompt enters one forward: in front of the text, or as keys and values that every layer attends to.

k is the number of virtual tokens. In front of the text: ids become embeddings (batch, k + n, size), the mask gets k
ones in its own dtype, given positions move by k, token types get k zeros, and labels of tokens get k times -100. As
keys and values: the text stays (batch, n), the mask is longer, and given positions move by k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.call import BASE
from ..core.past import name_among, past_in, with_past
from .cache import argument, prefix_cache
from .fitting import text_config
from .mixed import Mixed, hide, hide_decoder
from .padding import arranged, counted

if TYPE_CHECKING:
    from .holder import Prompts
    from .joined import Chosen

IGNORED = -100  # what losses leave out
_TEXTS = {False: ("input_ids", "inputs_embeds"), True: ("decoder_input_ids", "decoder_inputs_embeds")}


def extended(prompts: Prompts, chosen: Chosen, given: dict[str, Any], labels: str) -> dict[str, Any]:
    """The arguments of the base model's forward, with the prompts in them.

    Arguments:
        prompts: of the model.
        chosen: the prompts of the call.
        given: the arguments by name.
        labels: what `labels` are: "tokens", one for each token of the text; "decoder"; or "sample".
    """
    given = {k: v for k, v in given.items() if v is not None}
    (front, cached), decoder, task_ids = chosen, labels == "decoder", given.pop("task_ids", None)
    batch_of(given)
    before = past_in(given)
    goes_on = before is not None and _held(before) > 0  # an earlier step has put the prompts there
    there = [e for e in (cached, None if decoder else front) if goes_on and e is not None]
    if any(isinstance(e, Mixed) for e in there):
        raise ValueError(
            "adapter_names: step by step over a cache, samples cannot have prompts of their own; generate."
        )
    if front is not None and front not in there:
        given = _in_front_of_all(prompts, front, given, task_ids, labels)
    if there:
        return _continued(sum(e.num_virtual_tokens for e in there), given, decoder)
    if cached is None:
        return given
    if before is not None:
        raise ValueError(f"{name_among(given)} is given, but prefix tuning fills it. Use `generate`, or leave it out.")
    mask = "decoder_attention_mask" if decoder else "attention_mask"
    if not decoder and "attention_mask" in given:
        given = counted(prompts.model, cached, given)
    return hide(prompts.model, cached, behind_keys(prompts.model, cached, given, batch_of(given), mask), mask)


def _in_front_of_all(prompts: Prompts, encoder: Any, given: dict[str, Any], task_ids: Any, labels: str) -> Any:
    """The arguments with tokens in front of the text, their masks, and labels of tokens."""
    if labels == "sample" and isinstance(encoder, Mixed) and BASE in encoder.names:
        raise ValueError(
            "adapter_names: a head that reads the first token would read a virtual one of samples that have none "
            f"({BASE!r}, or an adapter of another kind). Run them apart, or use prefix tuning."
        )
    batch = batch_of(given)
    made = encoder.prompt(batch, checked_tasks(encoder, task_ids, batch))
    k = encoder.num_virtual_tokens
    out = hide(prompts.model, encoder, in_front(prompts, given, made[:, :k], encoder), "attention_mask")
    if labels == "tokens" and out.get("labels") is not None:
        out["labels"] = arranged(given, encoder, {"inputs_embeds": padded(out["labels"], k, IGNORED)})["inputs_embeds"]
    if labels == "decoder" and encoder.in_decoder and made.shape[1] > k:
        return hide_decoder(encoder, _decoder_in_front(prompts, out, made[:, k:]))
    return out


def batch_of(given: dict[str, Any]) -> int:
    """The number of samples; a symbol in graphs and traces, which serve others."""
    for name in ("input_ids", "inputs_embeds"):
        if given.get(name) is not None:
            rows: int = given[name].shape[0]
            return rows
    raise ValueError("You have to provide either input_ids or inputs_embeds: prompts stand in front of a text.")


def checked_tasks(encoder: Any, task_ids: Any, batch: int) -> Tensor | None:
    """The task of each sample, where the method asks for it."""
    if not encoder.by_task:
        return None
    if task_ids is None:
        raise ValueError("task_ids is missing: each sample has the prompt of its task. Pass a tensor with one id each.")
    task_ids = torch.as_tensor(task_ids, device=next(encoder.parameters()).device)
    if task_ids.shape != (batch,):
        raise ValueError(f"task_ids has the shape {tuple(task_ids.shape)}, but the batch has {batch} samples.")
    return task_ids


def in_front(prompts: Prompts, given: dict[str, Any], made: Tensor, encoder: Any) -> dict[str, Any]:
    """The arguments with virtual tokens in front of the text.

    Arguments:
        prompts: of the model.
        given: the arguments by name.
        made: (batch, k, size), what the encoder has made.
        encoder: of the prompt.
    """
    out, k = dict(given), made.shape[1]
    ids = out.pop("input_ids", None)
    text = out["inputs_embeds"] if ids is None else prompts.words(ids)
    out["inputs_embeds"] = torch.cat([made.to(text.dtype).to(text.device), text], dim=1)
    if out.get("attention_mask") is not None:
        out["attention_mask"] = padded(out["attention_mask"], k, 1)
    if out.get("position_ids") is not None:
        out["position_ids"] = moved(out["position_ids"], k)
    if out.get("token_type_ids") is not None:
        out["token_type_ids"] = padded(out["token_type_ids"], k, 0)
    if prompts.further is not None:
        _further(prompts, out, ids, getattr(encoder, "words", None) or [None] * k)
    return arranged(given, encoder, out)


def _further(prompts: Prompts, out: dict[str, Any], ids: Tensor | None, words: list[int | None]) -> None:
    """Put what each layer reads of the ids among the arguments.

    Arguments:
        prompts: of the model.
        out: the arguments, in which the text may have its own already.
        ids: of the text.
        words: the id of each virtual token; None for those that are no words, which are padding to layers, as images.
    """
    own = out.get("per_layer_inputs")
    if own is None and ids is None:
        return  # the model sees to embeddings without ids
    padding = getattr(text_config(prompts.model), "pad_token_id", None) or 0
    if own is None:
        for kind in ("image", "video", "audio"):
            number = getattr(prompts.model.config, f"{kind}_token_id", None)
            ids = ids if number is None else ids.masked_fill(ids == number, padding)  # type: ignore[union-attr]
        own = prompts.further.get_per_layer_inputs(ids)
    front = torch.tensor([padding if word is None else word for word in words], device=own.device)
    front = prompts.further.get_per_layer_inputs(front.expand(own.shape[0], -1))
    out["per_layer_inputs"] = torch.cat([front.to(own.dtype), own], dim=1)


def padded(values: Tensor, k: int, value: int) -> Tensor:
    """k columns of `value` in front, in the tensor's own dtype.

    Raises ValueError for a mask of four axes, which says more than which tokens there are.
    """
    if values.dim() != 2:
        raise ValueError(
            f"A mask or tensor of shape {tuple(values.shape)} cannot be made longer for virtual tokens. Pass one of "
            "shape (batch, tokens)."
        )
    return torch.cat([values.new_full((values.shape[0], k), value), values], dim=1)


def moved(positions: Tensor, k: int) -> Tensor:
    """Positions of the text after k virtual tokens, with theirs in front."""
    own = torch.arange(k, device=positions.device, dtype=positions.dtype).expand(*positions.shape[:-1], k)
    return torch.cat([own, positions + k], dim=-1)


def behind_keys(
    model: nn.Module, encoder: Any, given: dict[str, Any], rows: int, mask: str, filled: Any = None
) -> dict[str, Any]:
    """The arguments with a filled cache, whose keys the mask counts and the text's positions follow.

    Arguments:
        model: the base model.
        encoder: what makes keys and values.
        given: the arguments by name.
        rows: how many rows the cache has.
        mask: the name of the mask over the cache and the text; a decoder's text has positions of its own.
        filled: the cache; None makes one that grows.
    """
    name, k = argument(model), encoder.num_virtual_tokens
    out = with_past(given, name, prefix_cache(model, encoder, rows) if filled is None else filled)
    if out.get(mask) is not None:
        out[mask] = padded(out[mask], k, 1)
    if mask == "attention_mask" and out.get("position_ids") is not None:
        out["position_ids"] = out["position_ids"] + k
    return out


def _held(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else int(cache[0][0].shape[2])


def _continued(k: int, given: dict[str, Any], decoder: bool) -> dict[str, Any]:
    """A further step of a text behind k tokens: the mask may cover the text alone, and positions count it alone."""
    out = dict(given)
    text = given[next(n for n in _TEXTS[decoder] if n in given)]
    mask = "decoder_attention_mask" if decoder else "attention_mask"
    if mask in out and out[mask].shape[-1] < _held(past_in(out)) + text.shape[1]:
        out[mask] = padded(out[mask], k, 1)
    if not decoder and "position_ids" in out:
        out["position_ids"] = out["position_ids"] + k
    return out


def _decoder_in_front(prompts: Prompts, out: dict[str, Any], made: Tensor) -> dict[str, Any]:
    """Virtual tokens in front of the decoder's text too; without one, the labels moved right are the text."""
    k, labels = made.shape[1], out.get("labels")
    text = out.pop("decoder_inputs_embeds", None)
    ids = out.pop("decoder_input_ids", None)
    if text is None:
        if ids is None and labels is not None:
            ids = prompts.model.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
        if ids is None:
            raise ValueError("Give labels, decoder_input_ids or decoder_inputs_embeds: the decoder needs a text.")
        text = prompts.words(ids)
    out["decoder_inputs_embeds"] = torch.cat([made.to(text.dtype).to(text.device), text], dim=1)
    if out.get("decoder_attention_mask") is not None:
        out["decoder_attention_mask"] = padded(out["decoder_attention_mask"], k, 1)
    if labels is not None:
        out["labels"] = padded(labels, k, IGNORED)
    return out
