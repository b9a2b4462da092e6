"""Keys and values as a model's cache holds them: how many heads of which size, in which layers."""

from __future__ import annotations

import functools
import inspect
from typing import Any

Shape = tuple[int, int]  # heads, size of a head

_HEADS = (
    "num_key_value_heads", "decoder_attention_heads", "num_decoder_attention_heads", "num_attention_heads", "n_head",
    "num_heads",
)  # fmt: skip
_SIZES = ("head_dim", "d_kv", "kv_channels")
_WHOLE = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_decoder_layers", "decoder_layers")  # where a prefix goes, beside layers that an encoder has


def shapes(config: Any) -> list[Shape] | None:
    """The shape of each layer of a model whose layers differ; None where all are alike."""
    if getattr(config, "is_heterogeneous", False):
        return [found for found in map(shape, config.per_layer_config) if found is not None]
    if not getattr(config, "global_head_dim", None) or not getattr(config, "layer_types", None):
        return None
    small, heads = shape(config), getattr(config, "num_global_key_value_heads", None)
    if small is None:
        return None
    large = (heads or small[0], config.global_head_dim)
    return [large if kind == "full_attention" else small for kind in config.layer_types]


def shape(config: Any) -> Shape | None:
    """The shape of keys of a model, or of one of its layers; None where its configuration does not tell."""
    heads, size = _first(config, _HEADS), _first(config, _SIZES)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    if size is None:
        whole, queries = _first(config, _WHOLE), _first(config, _HEADS[1:])
        size = whole // queries if whole and queries else None
    return None if heads is None or size is None else (heads, size)


def provided(config: Any) -> Shape | None:
    """The shape that a prefix is made in: that of the layers whose heads are largest.

    Raises ValueError for a model that keeps something else than keys and values.
    """
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"The model caches what its keys and values are made of (kv_lora_rank={config.kv_lora_rank}), in which a "
            "prefix of keys and values has no place. Use prompt tuning or P-tuning."
        )
    known = shapes(config)
    return max(known, key=lambda found: found[1]) if known else shape(config)


def left_out(config: Any, count: int, made: Shape | None) -> list[int]:
    """The layers that take no prefix: they keep no keys of their own, or larger ones than it has.

    Arguments:
        config: of the model.
        count: how many layers the prefix has.
        made: the shape that it is made in.
    """
    if getattr(config, "layer_types", None) is None or made is None:
        return []
    held: list[Shape] | list[None] = shapes(config) or [None] * count
    layers = getattr(empty_cache(config), "layers", ())
    return [i for i in range(min(count, len(layers))) if room(layers[i], held[i], made) is None]


def empty_cache(config: Any) -> Any:
    """A cache that grows, with the layers of the configuration where that tells of their kinds."""
    from transformers.cache_utils import DynamicCache

    if getattr(config, "layer_types", None) is None or not _takes_config(DynamicCache):
        return DynamicCache()
    return DynamicCache(config=config)


@functools.cache
def _takes_config(kind: type) -> bool:
    return "config" in inspect.signature(kind.__init__).parameters  # type: ignore[misc]


def room(layer: Any, held: Shape | None, made: Shape) -> Shape | None:
    """How much of a prefix a layer of a cache takes, or None: it keeps no keys, or larger ones than the prefix has.

    Arguments:
        layer: of the cache; None where it is made when it is filled.
        held: the shape of the model's layer; None where all are alike.
        made: the shape of the prefix.
    """
    if layer is not None and (not hasattr(layer, "update") or type(layer).__name__ == "DummyLayer"):
        return None
    if held is None:
        return made
    return held if held[0] <= made[0] and held[1] <= made[1] else None


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((v for v in (getattr(config, name, None) for name in names) if v is not None), None)
