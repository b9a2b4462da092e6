"""A configuration in whose tensors several adapters fit, one after the other."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..algebra.lora import union
from ..config import PeftConfig
from .compatible import unlike

RESTRICTIONS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def room_for(configs: Iterable[Any]) -> Any:
    """The configuration of an adapter that has a place for each of some others: all their targets, the largest rank.

    Arguments:
        configs: of the adapters, of one method: configurations, or folders or repositories of saved adapters.

    Raises ValueError if they differ in more than selection, rank and scaling, or select by lists and by expressions,
    TypeError for what is neither a configuration nor a place.
    """
    given: list[Any] = _read(configs)
    if not given:
        raise ValueError("room_for needs at least one configuration.")
    first = copy.copy(given[0])
    for other in given[1:]:
        if (field := unlike(first, other)) is not None:
            raise ValueError(
                f"No room holds both: for {field}, {getattr(first, field, None)} != {getattr(other, field, None)}."
            )
    first.target_modules = union([c.target_modules for c in given])
    if first.target_modules is None and any(c.target_modules is not None for c in given):
        raise ValueError("Some target_modules are lists and some are expressions. Give a configuration of your own.")
    for name in RESTRICTIONS:
        if any(getattr(c, name, None) != getattr(first, name, None) for c in given):
            setattr(first, name, None)
    for name in ("target_parameters", "modules_to_save"):
        entries = [e for c in given for e in getattr(c, name, None) or ()]
        if entries:
            setattr(first, name, list(dict.fromkeys(entries)))
    if has_ranks(first):
        rank = max(largest_rank(c) for c in given)
        first.r, first.rank_pattern, first.alpha_pattern = rank, {}, {}
    if str(getattr(first, "init_lora_weights", True)).lower() not in ("true", "false"):
        first.init_lora_weights = True  # what an adapter starts from is in its file
    return first


def _read(configs: Any) -> list[PeftConfig]:
    single = isinstance(configs, (str, os.PathLike, PeftConfig, bytes, Mapping))
    if single or not isinstance(configs, Iterable):
        raise TypeError(
            f"room_for takes the configurations of several adapters, or their folders, in a list; got "
            f"{type(configs).__name__}. Use room_for([...])."
        )
    given = [PeftConfig.from_pretrained(c) if isinstance(c, (str, os.PathLike)) else c for c in configs]
    wrong = next((c for c in given if not isinstance(c, PeftConfig)), given)
    if wrong is not given:
        raise TypeError(
            f"room_for takes configurations such as LoraConfig(r=8), or the folders of saved adapters; got a "
            f"{type(wrong).__name__}. A loaded adapter's configuration is `model.peft_config[name]`."
        )
    return given


def has_ranks(config: Any) -> bool:
    """Whether a configuration gives each layer a rank by `r` and `rank_pattern`."""
    return hasattr(config, "r") and hasattr(config, "rank_pattern")


def largest_rank(config: Any) -> int:
    """The largest rank that a configuration with `r` and `rank_pattern` gives a layer."""
    patterns = getattr(config, "rank_pattern", None) or {}
    special = [f["r"] for f in (getattr(config, "module_config", None) or {}).values() if "r" in f]
    return max([int(config.r), *(r for r in patterns.values() if isinstance(r, int)), *special])
