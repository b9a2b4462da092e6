"""A prefix as the cache of keys and values that transformers' models take."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .encoder import BasePromptEncoder
from .fitting import text_config


def prefix_cache(model: nn.Module, encoder: BasePromptEncoder, rows: int) -> Any:
    """A cache whose every layer holds the prefix, for a batch of `rows`.

    Raises ValueError if the model's forward takes no cache.
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    taken = inspect.signature(model.forward).parameters
    if "past_key_values" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ValueError(
            f"{type(model).__name__} takes no past_key_values, so there is no place for a prefix. Use prompt tuning."
        )
    config: Any = text_config(model)
    pairs = layers_of(encoder, rows, model.dtype, bool(getattr(config, "is_encoder_decoder", False)))
    sliding = getattr(config, "layer_types", None) is not None
    cache = DynamicCache(config=config) if sliding else DynamicCache()
    for i, (key, value) in enumerate(pairs):
        cache.update(key, value, i)
    if not getattr(config, "is_encoder_decoder", False):
        return cache
    return EncoderDecoderCache(cache, DynamicCache())


def layers_of(encoder: BasePromptEncoder, rows: int, dtype: Any, two: bool) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer, each (rows, heads, k, size of a head).

    Arguments:
        encoder: its prompt is (rows, k, 2 layers x heads x size).
        rows: the batch.
        dtype: of the model.
        two: for an encoder-decoder; files of the peer are read with its order of entries, 4 i and 4 i + 1 of layer i.
    """
    heads, layers = encoder.heads, encoder.layers
    made = encoder.prompt(rows).to(dtype)
    k = made.shape[1]
    entries = made.reshape(rows, k, 2 * layers, heads, -1).permute(2, 0, 3, 1, 4)
    step = 4 if two else 2
    return [(entries[step * i % (2 * layers)], entries[(step * i + 1) % (2 * layers)]) for i in range(layers)]
