"""Tensors that files hold in another form than the model: in several parts, or once more beside what is shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .entries import Entry, spellings
from .shared import SharedTensors
from .wrappers import ModulesToSaveWrapper


def split(entry: Entry, key: str, value: Tensor) -> dict[str, Tensor]:
    """What a file holds of a tensor whose key there is `key`."""
    p = entry.adapter
    if p is None:
        return {key: value}
    parts = p.method.split(p, entry.part, value)
    if len(parts) == 1 and entry.part in parts:
        return {key: parts[entry.part]}
    before = key.removesuffix(entry.part)
    return {before + part: t for part, t in parts.items()}


def repeated(entry: Entry, key: str, config: Any) -> dict[str, Tensor]:
    """What files hold again beside a tensor whose key there is `key`.

    These are tensors that all layers share, and with `bias="all"` the biases of copies made by `modules_to_save`.
    """
    p = entry.adapter
    if p is None:
        again = _again(entry, key)
        return {again: entry.tensor.detach().clone()} if again and getattr(config, "bias", "none") == "all" else {}
    before = key.removesuffix(entry.part)
    hosts = ((name, p.shared[name]) for name in p.method.copies if name in p.shared)
    return {before + name: host.tensor(p.name).detach().clone() for name, host in hosts if host.slots(p.name)}


def _again(entry: Entry, key: str) -> str | None:
    """The second key of a bias in a copy made by `modules_to_save`."""
    if entry.attr != "bias" or not entry.part or not isinstance(entry.layer, ModulesToSaveWrapper):
        return None
    return f"{key.removesuffix(entry.part)}modules_to_save.{entry.part}"


def joined(entries: list[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, those in parts put together, and copies of shared tensors left out."""
    state = dict(state)
    for entry in entries:
        if again := _again(entry, entry.key):
            for spelled in spellings(again):
                state.pop(spelled, None)
        p = entry.adapter
        parts = () if p is None else p.method.parts(entry.part)
        if p is None or not (parts or p.method.copies):
            continue
        before = entry.key.removesuffix(entry.part)
        for spelled in spellings(before):
            for name in p.method.copies:
                state.pop(spelled + name, None)
            keys = [spelled + part for part in parts]
            if keys and all(k in state for k in keys):
                found = [state.pop(k) for k in keys]
                outline = any(t.is_meta for t in found)
                value = entry.tensor.to("meta") if outline else p.method.join(p, entry.part, found)
                state[spelled + entry.part] = value
    return state


def written(entries: list[Entry]) -> None:
    """Tell the adapters' methods that a file was written into their tensors."""
    for entry in entries:
        if isinstance(entry.owner, SharedTensors):
            entry.owner.join(entry.attr)
    adapters = {id(e.adapter): e.adapter for e in entries if e.adapter is not None}
    for p in adapters.values():
        with p.layer.readable():
            p.method.written(p)
        if "tied_to" in p.__dict__:
            getattr(p.method, "of", p.method).tie_again(p)
