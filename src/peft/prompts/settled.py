"""A prompt in front of the text, settled in the cache before `generate` starts.

Then the text stays ids, which some ways to decode ask for: who proposes tokens appends them to the ids, and what
penalises the text's own tokens looks them up there. The first tokens of a decoder see none of the later ones, so that
their keys and values are the same whether the text is there or not.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.call import BASE
from ..core.past import past_name, past_of
from .cache import argument, prefix_cache, setting
from .inputs import checked_tasks, in_front
from .mixed import Mixed
from .padding import before_text, windowed

if TYPE_CHECKING:
    from .holder import Prompts
    from .joined import Chosen

PROPOSE = ("prompt_lookup_num_tokens", "assistant_early_exit")
PENALTIES = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}  # and what is none


def proposed(given: dict[str, Any], settings: Any) -> bool:
    """Whether tokens are proposed in advance, by a smaller model, by early layers or from the text.

    Arguments:
        given: the arguments of `generate`.
        settings: the model's own of generation.

    Raises ValueError if they are and the text is padded: transformers then cuts the mask as if there were no prompt.
    """
    if given.get("assistant_model") is None and all(setting(given, settings, n) is None for n in PROPOSE):
        return False
    if not bool(given["attention_mask"].all()):
        raise ValueError(
            "Assisted generation takes one text, and behind a prompt it may not be padded. Leave out the tokens where "
            "the attention_mask is 0."
        )
    return True


def by_ids(prompts: Prompts, front: Any, given: dict[str, Any], settings: Any) -> bool:
    """Whether the model, or the way to decode, needs the text behind the prompt `front` as ids; the rest as for
    `proposed`.
    """
    if proposed(given, settings):
        return front is not None
    model, alone = prompts.model, front is not None and not isinstance(front, Mixed)
    if alone and (prompts.further is not None or not _starts_from_embeddings(model)):
        return past_name(model) is not None
    if alone and before_text(given.get("attention_mask")) is not None and windowed(model):
        return False  # in front of all, the prompt would be out of the windows' reach
    penalised = any(setting(given, settings, n) not in (None, none) for n, none in PENALTIES.items())
    return penalised and front is not None and not isinstance(front, Mixed)


def _starts_from_embeddings(model: Any) -> bool:
    """Whether transformers lets the model generate from embeddings: by this argument, it says."""
    return "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters


class Settled:
    """Stands in the place of an encoder of keys and values, and fills a cache by running the prompt.

    Arguments:
        prompts: of the model.
        chosen: the prompts of the call, one in front of the text and perhaps keys and values.
        ids: of the text.
        task_ids: the task of each sample, or None.
    """

    def __init__(self, prompts: Prompts, chosen: Chosen, ids: Tensor, task_ids: Any) -> None:
        self.prompts, self.chosen, self.ids, self.task_ids = prompts, chosen, ids, task_ids
        self.num_virtual_tokens = chosen.tokens

    @torch.no_grad()
    def filled(self, model: nn.Module, rows: int, empty: Any) -> Any:
        """The cache that holds the prompt, `empty` or one that grows, for a batch of `rows`."""
        (front, cached), none = self.chosen, self.ids[:, :0]
        batch = len(none)
        made = front.prompt(batch, checked_tasks(front, self.task_ids, batch))[:, : front.num_virtual_tokens]
        given = in_front(self.prompts, {"input_ids": none}, made, front)
        given = {n: v.repeat_interleave(rows // batch, 0) for n, v in given.items()}
        if cached is not None:
            empty = prefix_cache(model, cached, rows, empty)
        self.prompts.call.ids = none  # there is no text yet in which an adapter could start
        mask = none.new_ones(rows, self.num_virtual_tokens)
        return past_of(model(**given, attention_mask=mask, use_cache=True, **{argument(model): empty}))


class Ahead:
    """Stands in the place of an encoder of keys and values, and runs a decoder's own virtual tokens into its cache.

    Arguments:
        own: the tokens in front of the decoder's text, (batch, k, size).
        front: what made them.
        cached: what makes keys and values before them, or None.
    """

    def __init__(self, own: Tensor, front: Any, cached: Any) -> None:
        self.own, self.front, self.cached = own, front, cached
        self.before = 0 if cached is None else cached.num_virtual_tokens
        self.num_virtual_tokens = self.before + own.shape[1]

    @torch.no_grad()
    def filled(self, model: nn.Module, rows: int, empty: Any, given: dict[str, Any]) -> Any:
        """The cache that holds them, `empty` or one that grows, for a batch of `rows` over the encoded text."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        if self.cached is None:
            cache = EncoderDecoderCache(empty or DynamicCache(), DynamicCache())
        else:
            cache = prefix_cache(model, self.cached, rows, empty)
        times, encoded = rows // len(self.own), given["encoder_outputs"][0]
        own = self.own.to(encoded.dtype).repeat_interleave(times, 0)
        mask = own.new_ones(rows, self.num_virtual_tokens, dtype=torch.long)
        text = {"attention_mask": given["attention_mask"].repeat_interleave(times, 0)}
        if self.cached is not None:
            text["decoder_attention_mask"] = self._absent(self.cached, mask, 0, times)
        model(
            **text,
            encoder_outputs=(encoded.repeat_interleave(times, 0),),
            decoder_inputs_embeds=own,
            use_cache=True,
            **{argument(model): cache},
        )
        return cache

    def hidden(self, out: dict[str, Any]) -> dict[str, Any]:
        """The arguments with what samples lack masked out of the decoder's mask."""
        mask = self._absent(self.front, out["decoder_attention_mask"], self.before)
        if self.cached is not None:
            mask = self._absent(self.cached, mask, 0)
        return {**out, "decoder_attention_mask": mask}

    def _absent(self, encoder: Any, mask: Tensor, start: int, times: int = 1) -> Tensor:
        if not isinstance(encoder, Mixed) or BASE not in encoder.names:
            return mask
        mask, end = mask.clone(), self.num_virtual_tokens if encoder is self.front else self.before
        mask[encoder.absent(mask.device).repeat_interleave(times), start:end] = 0
        return mask
