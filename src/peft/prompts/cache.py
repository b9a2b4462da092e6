"""A prefix as the cache of keys and values that transformers' models take."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..core.past import past_name
from ..core.sharded.edge import part_of_heads
from ..core.sharded.gather import together
from ..core.tie import innermost
from . import keys
from .encoder import BasePromptEncoder
from .fitting import text_config

PROJECTIONS = frozenset({"k_proj", "qkv_proj", "query_key_value"})  # what makes keys, alone or with others
KINDS = ("dynamic", "offloaded", "static", "offloaded_static", "quantized")


def prefix_cache(model: nn.Module, encoder: BasePromptEncoder, rows: int, empty: Any = None) -> Any:
    """A cache whose every layer holds the prefix, for a batch of `rows`.

    Arguments:
        model: the base model.
        encoder: what makes keys and values.
        rows: how many rows the cache has.
        empty: the cache to be filled; None makes one that grows.
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    config: Any = text_config(model)
    pairs = layers_of(encoder, rows, model.dtype)
    cache = empty or keys.empty_cache(config)
    layers = getattr(cache, "layers", ()) if getattr(config, "layer_types", None) is not None else ()
    held = keys.shapes(config)
    makes = _makes_keys(model) if together() else None
    for i, (key, value) in enumerate(pairs):
        layer, made = layers[i] if i < len(layers) else None, (key.shape[1], key.shape[3])
        found = keys.room(layer, None if held is None else held[i], made)
        if found is not None and found != made:
            key, value = (part[:, : found[0], :, : found[1]] for part in (key, value))
        if makes is not None:
            key, value = (part_of_heads(part, 1, makes) for part in (key, value))
        if found is not None:
            cache.update(key, value, i)
    if not getattr(config, "is_encoder_decoder", False):
        return cache
    return EncoderDecoderCache(cache, DynamicCache())


def argument(model: nn.Module) -> str:
    """The name of the cache among the arguments of the model's forward, or of its body's.

    Raises ValueError if neither takes one.
    """
    name = past_name(model)
    if name is None:
        raise ValueError(
            f"{type(model).__name__} takes no past_key_values, so there is no place for a prefix. Use prompt tuning."
        )
    return name


def _makes_keys(model: nn.Module) -> nn.Module | None:
    """The first layer that makes keys; the split of its heads is that of all."""
    found = (m for n, m in model.named_modules() if n.rpartition(".")[2] in PROJECTIONS)
    return next(map(innermost, found), None)


def asked_for(model: nn.Module, given: dict[str, Any], text: int) -> Any:
    """The empty cache that `cache_implementation` asks `generate` for, or None for one that grows.

    Arguments:
        model: the base model.
        given: the arguments of `generate`; what describes the cache is taken out, since a filled one is handed over.
        text: how many tokens the prefix and the given text have.

    Raises ValueError for a name that is none.
    """
    from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

    default = getattr(model, "generation_config", None)
    kind = setting(given, default, "cache_implementation")
    if kind is None:
        return None
    settings = setting(given, default, "cache_config")
    kind = {"sliding_window": "static", "hybrid": "static"}.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(f"cache_implementation={kind!r} is none of {', '.join(map(repr, KINDS))}.")
    config, away = text_config(model), kind.startswith("offloaded")
    longest = max(setting(given, default, name) or 0 for name in ("max_length", "max_cache_len"))
    room = max(text + (setting(given, default, "max_new_tokens") or 20), text + longest)
    _take_out(given, default)
    if kind == "quantized":
        settings = {"config": config, "backend": "quanto", **(settings or {})}
        return QuantizedCache(**settings)
    if kind.endswith("static"):
        return StaticCache(config=config, max_cache_len=room, offloading=away)
    return DynamicCache(config=config, offloading=True) if away else None


def setting(given: dict[str, Any], default: Any, name: str) -> Any:
    """A setting of generation: by name, in the configuration that is given, or in the model's."""
    found = (given.get(name), getattr(given.get("generation_config"), name, None), getattr(default, name, None))
    return next((value for value in found if value is not None), None)


def _take_out(given: dict[str, Any], default: Any) -> None:
    """Remove what describes the cache, wherever it is set; an argument of None is stronger than the model's value."""
    for name in ("cache_implementation", "cache_config"):
        given.pop(name, None)
        if getattr(given.get("generation_config"), name, None) is not None:
            given["generation_config"] = copy.deepcopy(given["generation_config"])
            setattr(given["generation_config"], name, None)
        if getattr(default, name, None) is not None:
            given[name] = None


def layers_of(encoder: BasePromptEncoder, rows: int, dtype: Any) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer, each (rows, heads, k, size of a head).

    Arguments:
        encoder: its prompt is (rows, k, 2 layers x heads x size).
        rows: the batch.
        dtype: of the model.
    """
    heads, layers = encoder.heads, encoder.layers
    made = encoder.prompt(rows).to(dtype)
    k = made.shape[1]
    entries = made.reshape(rows, k, 2 * layers, heads, -1).permute(2, 0, 3, 1, 4)
    step, every = encoder.stride, 2 * layers  # with the peer's order of entries: of two stacks each second pair, twice
    return [(entries[step * i % every], entries[(step * i + 1) % every]) for i in range(layers)]
