"""Adapter files: written whole or not at all, read with their faults named."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PeftWarning, listing, report
from . import hub
from .commit import staged
from .defaults import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .header import CHECKSUM, Header, read_header
from .payload import SUMMED, at_hand, data_of, finite, is_sound, numbers_of, tensors_of, write_file

__all__ = [
    "Saved",
    "check_written",
    "in_hand",
    "keys_in_hand",
    "open_weights",
    "read_weights",
    "staged",
    "write_weights",
]

INDEX_NAME = f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
SHARD_SIZE = "50GB"  # what the hub takes as one file
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


CONFIG_HASH = "config_hash"  # key among a file's remarks
# Fields of a configuration that change no number of an adapter: people rename their base models.
_OF_NO_ACCOUNT = frozenset(
    ["auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"]
)


def config_hash(values: Mapping[str, Any]) -> str:
    """A hash of the fields of a configuration file that say what an adapter computes."""
    told = {k: v for k, v in values.items() if k not in _OF_NO_ACCOUNT}
    return "sha256:" + hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


# Writing ------------------------------------------------------------------------------------------------------------


def write_weights(
    state: Mapping[str, Tensor],
    folder: Path,
    safe: bool = True,
    max_shard_size: int | str = SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write one adapter's tensors and return the paths of the files that hold them; warn of numbers not finite.

    Arguments:
        state: checkpoint key -> tensor; tensors that share storage are written apart.
        folder: an existing folder.
        safe: `adapter_model.safetensors`; False writes `adapter_model.bin` (a pickle).
        max_shard_size: bytes, or a text such as "5GB"; what is larger is written as several files with an index.
        metadata: remarks to put into the head of each safetensors file.
    """
    if not safe:
        with open(folder / WEIGHTS_NAME, "wb") as handle:  # a file of Python's tells what the system says
            torch.save(dict(state), handle)
        _report_infinite(WEIGHTS_NAME, _infinite(state))
        return [folder / WEIGHTS_NAME]
    shards = _shards(state, _bytes(max_shard_size))
    names = [SAFETENSORS_WEIGHTS_NAME] if len(shards) == 1 else _shard_names(len(shards))
    remarks = {"format": "pt", **(metadata or {})}
    for name, shard in zip(names, shards, strict=True):
        if not write_file(folder / name, shard, remarks):
            _report_infinite(name, _infinite(shard))
    if len(shards) > 1:
        _write_index(folder, dict(zip(names, shards, strict=True)))
    return [folder / name for name in names]


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    checksums = {name: read_header(folder / name).metadata[CHECKSUM] for name in shards}
    total = sum(t.numel() * t.element_size() for shard in shards.values() for t in shard.values())
    places = {key: name for name, shard in shards.items() for key in shard}
    index = {"metadata": {"total_size": total, "checksums": checksums}, "weight_map": places}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shard_names(count: int) -> list[str]:
    stem, _, suffix = SAFETENSORS_WEIGHTS_NAME.rpartition(".")
    return [f"{stem}-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)]


def _shards(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, as many together as stay below the limit; a larger one is alone."""
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for key, tensor in state.items():
        size = tensor.nbytes
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][key] = tensor
        room -= size
    return shards


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise ValueError(f"max_shard_size={size!r} is no size. Give a number of bytes, or a text such as '5GB'.")
    return int(float(match[1]) * _UNITS[match[2]])


def check_written(files: list[Path], state: Mapping[str, Tensor]) -> None:
    """Read files again, from the disk where the system allows it, and compare every byte; raises OSError on a
    difference.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        _forget(file)
        header = read_header(file)
        data = data_of(file, header)
        if not is_sound(data, header):
            raise OSError(f"{file} does not hold what was saved: its checksum is wrong. Check the disk and save again.")
        found.update(tensors_of(data, header))
    wrong = sorted(k for k in found.keys() | state.keys() if not _same(found.get(k), state.get(k)))
    if wrong:
        raise OSError(
            f"{listing(map(str, files))} does not hold what was saved: {listing(wrong)} differ. Check the disk and "
            "save again."
        )


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
        return False
    raw = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return torch.equal(*raw)


def _forget(file: Path) -> None:
    """Ask the system to read a file from the disk next time."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


# Reading ------------------------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """An adapter's files, of which no more than the heads have been read (pickles have none: they are read whole).

    Arguments:
        heads: the head of each file.
        state: the tensors of a pickle.
    """

    heads: dict[str, Header] = field(default_factory=dict)
    state: dict[str, Tensor] | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """The remarks of the first file."""
        return next((head.metadata for head in self.heads.values()), {})

    @property
    def outline(self) -> dict[str, Tensor]:
        """The tensors without their numbers, on the meta device."""
        if self.state is not None:
            return {k: v.to("meta") for k, v in self.state.items()}
        return {k: form for head in self.heads.values() for k, form in head.tensors.outline.items()}

    def read(self, device: str | torch.device | None = None, own: bool = False) -> dict[str, Tensor]:
        """The tensors; warns of numbers that are not finite.

        Arguments:
            device: where to put them; None is the CPU, and loading copies them to each parameter's device.
            own: each in memory of its own, which belongs to the caller.

        Raises ValueError for a file whose data is not what its checksum was taken of.
        """
        if self.state is not None:
            _report_infinite(next(iter(self.heads), WEIGHTS_NAME), _infinite(self.state))
            state = {k: v.clone() for k, v in self.state.items()} if own else dict(self.state)
        else:
            state = {}
            for file, head in self.heads.items():
                state.update(_read_safetensors(file, head, own))
        return state if device is None else {k: v.to(device) for k, v in state.items()}

    def noted(self, model: Any, name: str) -> dict[str, Tensor]:
        """What training has left of an adapter beside its files, where the adapter has a place for it."""
        beside = model.__dict__.get("prompts")
        return {} if beside is None or not self.heads else beside.noted(name, os.path.dirname(next(iter(self.heads))))


def open_weights(
    file: str | os.PathLike[str], fetch: Callable[[str], str] | None = None, strict: bool | None = None
) -> Saved:
    """Look into an adapter's file.

    Arguments:
        file: a `.safetensors` file, the index of several, or a pickle, which is read with `weights_only=True`.
        fetch: gives the path of a file that an index names; None looks beside the index.
        strict: whether pickles are refused; None follows `peft.set_strict`.

    Raises ValueError naming the file and the cause if it is truncated, damaged or no tensor file.
    """
    text = os.fspath(file)
    if text.endswith(".index.json"):
        beside = os.path.dirname(text)
        return _open_shards(text, fetch or (lambda name: hub.fetch(beside, name)))
    if text.endswith(".safetensors"):
        return Saved({text: read_header(file)})
    return Saved(state=_read_pickle(text, strict))


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of an adapter's file; errors as for `open_weights` and `Saved.read`."""
    return open_weights(file).read(None)


def _open_shards(index: str, fetch: Callable[[str], str]) -> Saved:
    places, checksums = _index(index)
    heads: dict[str, Header] = {}
    for name in sorted(set(places.values())):
        try:
            path = fetch(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{index} names {name!r}, which is missing: {error} Download or save it again.") from error
        head = read_header(path)
        wanted = {k for k, n in places.items() if n == name}
        wrong = sorted(wanted ^ head.tensors.keys())
        if wrong:
            raise ValueError(f"{path} does not belong to {index}: only one of them has {listing(wrong)}.")
        if checksums.get(name) not in (None, head.metadata.get(CHECKSUM)):
            raise ValueError(f"{path} does not belong to {index}: it comes from another save. Download both again.")
        heads[path] = head
    return Saved(heads)


def _index(file: str) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        with open(file, encoding="utf-8") as handle:
            index = json.load(handle)
        places, checksums = index["weight_map"], index.get("metadata", {}).get("checksums", {})
        sound = bool(places) and all(_is_name(n) for n in places.values()) and isinstance(checksums, dict)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no index of safetensors files ({error}). Download or save it again.") from error
    if not sound:
        raise ValueError(f"{file}: its weight_map must name safetensors files in the same folder.")
    return places, checksums


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) is not None


def _read_safetensors(file: str, header: Header, own: bool) -> dict[str, Tensor]:
    with at_hand(file, header) as (data, lent):
        if not is_sound(data, header):
            raise ValueError(
                f"{file} is damaged: its tensors are not those that its checksum was taken of when it was saved. "
                "Download it again. (A program that changes tensors and keeps the old metadata must leave the checksum "
                "out.)"
            )
        state = tensors_of(data, header, own or lent)
        if not _finite_as_one(data, header):
            _report_infinite(file, _infinite(state))
        return state


def _finite_as_one(data: Tensor, header: Header) -> bool:
    """Whether the numbers of a file are finite for sure: one look at all of them, where they are of one dtype."""
    numbers = numbers_of(data, header)
    if numbers is None or numbers.dtype not in SUMMED:
        return False
    return math.isfinite(numbers.sum().item())


def _read_pickle(file: str, strict: bool | None) -> dict[str, Tensor]:
    text = f"{file} is a pickle; only its tensors are read. Save the adapter again to get the safer safetensors format."
    report(PeftWarning, text, strict, stacklevel=5)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} could not be read as a file of tensors ({error}). It may be truncated, or hold other objects than "
            "tensors, which are refused: download it again, or convert it to safetensors where you trust it."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} does not hold a dictionary of tensors. Expected what `save_pretrained` writes.")
    return state


def _report_infinite(file: str, keys: list[str]) -> None:
    if keys:
        text = f"{file} holds NaN or infinite values in {listing(keys)}. The adapter's outputs will not be usable."
        warnings.warn(text, PeftWarning, stacklevel=5)


def _infinite(state: Mapping[str, Tensor]) -> list[str]:
    return [k for k, v in state.items() if v.is_floating_point() and not (v.is_meta or finite(v))]


# What is being loaded -----------------------------------------------------------------------------------------------

_in_hand: ContextVar[Collection[str]] = ContextVar("in_hand", default=())


@contextmanager
def in_hand(keys: Collection[str]) -> Iterator[None]:
    """While open, an adapter is made that will be filled from a file with these keys."""
    token = _in_hand.set(keys)
    try:
        yield
    finally:
        _in_hand.reset(token)


def keys_in_hand() -> Collection[str]:
    """The keys of the file that the adapter which is being made will be filled from; none if there is no file."""
    return _in_hand.get()
