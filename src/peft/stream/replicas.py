"""Layers of a base that an adapter repeats (`layer_replication`): each is a layer of the files in its own right."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..core.replicate import layer_list, order_of, replicate
from .names import Names
from .placing import Source
from .shards import CheckpointError, Header, Shards, Stored


def ranges_of(sources: Sequence[Source]) -> list[list[int]]:
    """The ranges of layers that the adapters ask for; none for the layers as they are.

    The configurations forget them: the layers are repeated before adapters are placed. Raises CheckpointError unless
    the first adapter has those of all, as in memory.
    """
    found = [[list(pair) for pair in getattr(s.config, "layer_replication", None) or ()] for s in sources]
    for source, ranges in zip(sources, found, strict=True):
        if ranges and ranges != found[0]:
            raise CheckpointError(
                f"The adapter in {source.place} repeats layers of the base (layer_replication={ranges}), but the first "
                f"adapter is for {found[0] or 'the layers as they are'}. Merge it into the base by itself."
            )
        if ranges:
            source.config.layer_replication = None
    return found[0]


def widened(names: Names, shards: Shards, ranges: list[list[int]]) -> tuple[Shards, dict[str, Any]]:
    """The checkpoint of the model with repeated layers, and what config.json says otherwise then.

    The new tensors lie where those of the layers do that they repeat, so that nothing is copied before it is written.

    Arguments:
        names: of the base; its model gets the layers, each with tensors of its own.
        shards: the base's files.
        ranges: pairs [start, end).

    Raises CheckpointError for keys that do not tell their layer, and what `replicate` raises.
    """
    model = names.model
    owner, leaf = layer_list(model)
    layers: Any = owner._modules[leaf]
    order = order_of(ranges, len(layers))
    above = next(path for path, module in model.named_modules() if module is owner)
    starts = _starts(names, f"{above}.{leaf}" if above else leaf, leaf)
    before = _stated(model)
    replicate(model, ranges)
    new: Any = owner._modules[leaf]
    owner._modules[leaf] = type(new)(copy.deepcopy(layer) for layer in new)
    after = _stated(model)
    changes = {k: v for k, v in after.items() if before.get(k) != v}
    if before and not changes and len(order) != len(layers):
        raise CheckpointError(
            f"The configuration of {type(model).__name__} does not say how many layers the model has, so that of a "
            "model with repeated layers cannot be written. Load the model and merge in memory."
        )
    files = {}
    for file, header in shards.files.items():
        tensors = [new for stored in header.tensors for new in _repeated(stored, starts, order)]
        if tensors:
            files[file] = Header(None, header.remarks, sorted(tensors, key=lambda s: -s.dtype.itemsize))
    return Shards(shards.folder, files, shards.index), changes


def _starts(names: Names, path: str, leaf: str) -> list[str]:
    """How keys of files begin that belong to a layer, up to the layer's number."""
    found: dict[str, None] = {}
    for group in names.groups:
        number = re.match(rf"{re.escape(path)}\.(\d+)\.", group.names[0]) if group.names else None
        for key in group.keys if number else ():
            places = [m.end() for m in re.finditer(rf"(?<![^.]){leaf}\.(?={number[1]}\.)", key)]  # type: ignore[index]
            if len(places) != 1:
                raise CheckpointError(
                    f"{key!r} belongs to layer {number[1]} of the model ({path}), but its name does not say so. "  # type: ignore[index]
                    "Load the model and merge in memory."
                )
            found[key[: places[0]]] = None
    return list(found)


def _repeated(stored: Stored, starts: list[str], order: list[int]) -> Iterator[Stored]:
    """The tensor, or one for each layer that repeats its layer."""
    for start in starts:
        number, dot, rest = stored.key.removeprefix(start).partition(".")
        if stored.key.startswith(start) and number.isdigit() and dot:
            for new, old in enumerate(order):
                if old == int(number):
                    yield dataclasses.replace(stored, key=f"{start}{new}.{rest}")
            return
    yield stored


def _stated(model: nn.Module) -> dict[str, Any]:
    """What config.json would say of a model."""
    config: Any = getattr(model, "config", None)
    return dict(config.to_dict()) if hasattr(config, "to_dict") else {}
