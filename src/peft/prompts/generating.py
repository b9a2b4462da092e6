"""How a prompt enters `generate`: by the public arguments of transformers, in the first step; the cache carries it on.

In front of the text: embeddings are given beside the ids. As keys and values: a filled cache and a mask that counts it,
from which transformers sees that the ids are new ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .cache import asked_for, prefix_cache, setting
from .checkpointed import checkpoints
from .inputs import batch_of, behind_keys, checked_tasks, in_front
from .keys import empty_cache
from .mixed import hide
from .padding import tell_of_windows
from .running import OURS
from .settled import Ahead, Settled, by_ids, proposed

if TYPE_CHECKING:
    from .holder import Prompts

SHOWN = ("output_attentions", "output_hidden_states")
LENGTHS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))


def generate(prompts: Prompts, run: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """The base model's `generate` with the prompt.

    Arguments:
        prompts: of the model.
        run: the base model's `generate`.
        args: the ids, if they are given by position, and what may follow.
        given: the arguments by name.
    """
    chosen = front, cached = prompts.chosen(given)
    if chosen == (None, None):
        return run(*args, **{k: v for k, v in given.items() if k not in OURS})
    settings = getattr(prompts.model, "generation_config", None)  # a None for one of them overrides the model's value
    kept = {k: v for k, v in given.items() if v is not None or hasattr(settings, k)}
    given = {k: v for k, v in kept.items() if k not in OURS - {"task_ids"}}
    args = _named(args, given)
    task_ids = given.pop("task_ids", None)
    batch = batch_of(given)
    _give_mask(prompts.model, given)
    two = bool(getattr(prompts.model.config, "is_encoder_decoder", False))
    ids, prompts.call.virtual = given.get("input_ids"), chosen.tokens
    if (front is not None or two) and setting(given, settings, "prefill_chunk_size"):
        given["prefill_chunk_size"] = None  # transformers cuts ids into chunks, and these are embeddings
    if not two and ids is not None and by_ids(prompts, front, given, settings):
        front, cached = None, Settled(prompts, chosen, ids, task_ids)
    if front is not None:
        made = front.prompt(batch, checked_tasks(front, task_ids, batch))
        text, own = made[:, : front.num_virtual_tokens], made[:, front.num_virtual_tokens :]
        given = hide(prompts.model, front, in_front(prompts, given, text, front), "attention_mask", True)
        if two and front.in_decoder and own.shape[1]:
            cached = Ahead(own, front, cached)
    if cached is not None:
        mask = "decoder_attention_mask" if two else "attention_mask"
        if not two:
            new = setting(given, settings, "max_new_tokens") or setting(given, settings, "max_length") or 0
            tell_of_windows(prompts.model, cached, given, new)
        given = hide(prompts.model, cached, _cached(prompts, cached, given, batch, two), mask, True)
        padded = given.get("inputs_embeds") is not None and "cache_position" not in given
        if not two and padded:  # transformers cuts off as many as the cache holds
            given["inputs_embeds"] = pad(given["inputs_embeds"], (0, 0, cached.num_virtual_tokens, 0))
    if front is not None and not two and ids is not None:
        prompts.call.ids = given["input_ids"] = ids  # generated tokens follow them in the result
        _lengths(prompts.model, given, ids.shape[1])
    return run(*args, **given)


def _named(args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments by position that are left once the first, the ids, has its name."""
    if args:
        given["input_ids"] = args[0]
        given.update(zip(("generation_config",), args[1:2], strict=False))
    elif "inputs" in given:
        given["input_ids"] = given.pop("inputs")
    return args[2:]


def _give_mask(model: nn.Module, given: dict[str, Any]) -> None:
    """The mask that transformers would make of the ids: padding is left out where it can be told."""
    ids = given.get("input_ids")
    if given.get("attention_mask") is not None:
        return
    source = given.get("generation_config") or getattr(model, "generation_config", None)
    padding = given.get("pad_token_id", getattr(source, "pad_token_id", None))
    end = given.get("eos_token_id", getattr(source, "eos_token_id", None))
    if ids is None:
        given["attention_mask"] = torch.ones(
            given["inputs_embeds"].shape[:2], dtype=torch.long, device=given["inputs_embeds"].device
        )
    elif padding is not None and padding not in _listed(end) and bool((ids == padding).any()):
        given["attention_mask"] = ids.ne(padding).long()
    else:
        given["attention_mask"] = torch.ones_like(ids)


def _listed(end: Any) -> list[Any]:
    return list(end) if isinstance(end, (list, tuple)) else [end]


def _lengths(model: nn.Module, out: dict[str, Any], tokens: int) -> None:
    """Lengths that count the ids as numbers of new tokens: the embeddings are longer than the ids."""
    config = out.get("generation_config")
    for whole, new in LENGTHS:
        if out.get(new) is not None or getattr(config, new, None) is not None:
            continue
        wanted = out.pop(whole, None)
        wanted = getattr(config, whole, None) if wanted is None else wanted
        if wanted:
            out[new] = max(int(wanted) - tokens, 1 if new == "max_new_tokens" else 0)
            if config is not None:
                config = out["generation_config"] = copy.deepcopy(config)
                setattr(config, whole, None)


def _behind_in_four(model: nn.Module, out: dict[str, Any], tokens: int, k: int) -> None:
    """Say where the text is: transformers 4 takes a filled cache for the text's beginning.

    Raises ValueError for releases and ways to decode that do not listen.
    """
    if not hasattr(empty_cache(None), "layers"):
        raise ValueError(
            "Before transformers 4.54, `generate` takes what the cache holds for the beginning of the text, so that a "
            "prompt cannot stand there. Install a later transformers, or use prompt tuning."
        )
    if proposed(out, getattr(model, "generation_config", None)):
        raise ValueError(
            "In transformers 4, assisted generation counts proposed tokens from the beginning of the text, as if no "
            "prompt stood in the cache before it. Install transformers 5, or generate without assistance."
        )
    out["cache_position"] = torch.arange(tokens, device=out["attention_mask"].device) + k


def _cached(prompts: Prompts, encoder: Any, given: dict[str, Any], batch: int, two: bool) -> dict[str, Any]:
    model, out = prompts.model, dict(given)
    config = out.get("generation_config") or getattr(model, "generation_config", None)
    out["use_cache"] = True  # the prompt lives there; without a cache the tokens would be the same
    if checkpoints(model):
        raise ValueError(
            "The model is in training mode with gradient checkpointing, whose layers take no cache, but the prompt "
            "lives there. Call `model.eval()` before generating."
        )
    wanted = (out.get(n, getattr(config, n, None)) or 1 for n in ("num_beams", "num_return_sequences"))
    rows = batch * max(*wanted)
    texts = ("decoder_input_ids",) if two else ("input_ids", "inputs_embeds")
    longest = max([out[n].shape[1] for n in texts if out.get(n) is not None], default=1)
    empty = asked_for(model, out, encoder.num_virtual_tokens + longest)
    if hasattr(model, "_get_initial_cache_position"):
        _behind_in_four(model, out, longest, encoder.num_virtual_tokens)
    if not two:
        settled = isinstance(encoder, Settled)
        filled = encoder.filled(model, rows, empty) if settled else prefix_cache(model, encoder, rows, empty)
        return behind_keys(model, encoder, out, rows, "attention_mask", filled)
    if "encoder_outputs" not in out:
        encode: Any = model.get_encoder()  # type: ignore[operator]
        text = {n: out[n] for n in ("input_ids", "inputs_embeds", "attention_mask") if n in out}
        shown = {n: setting(out, config, n) for n in SHOWN}
        out["encoder_outputs"] = encode(**text, **shown, return_dict=True)
    start: Tensor | None = out.get("decoder_input_ids")
    out["decoder_attention_mask"] = out["attention_mask"].new_ones(batch, 1 if start is None else start.shape[1])
    ahead = isinstance(encoder, Ahead)
    filled = encoder.filled(model, rows, empty, out) if ahead else prefix_cache(model, encoder, rows, empty)
    out = behind_keys(model, encoder, out, rows, "decoder_attention_mask", filled)
    return encoder.hidden(out) if ahead else out
