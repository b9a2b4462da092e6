"""Safetensors files tensor by tensor: headers first, numbers only when asked for, nothing mapped into memory."""

from __future__ import annotations

import ctypes
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PeftError, listing

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; the limit of the format
CHUNK = 16 * 2**20  # bytes that are copied at a time
KINDS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
NAMES = {kind: name for name, kind in KINDS.items()}


class CheckpointError(PeftError, ValueError):
    """A checkpoint, or a folder for one, that cannot be used as it is."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `start` and `stop` are offsets in the file."""

    key: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    def same(self, other: Stored) -> bool:
        """Whether another tensor has the same bytes."""
        if (self.kind, self.shape) != (other.kind, other.shape):
            return False
        return all(one == two for one, two in zip(self.chunks(), other.chunks(), strict=True))

    @property
    def dtype(self) -> torch.dtype | None:
        """As torch has it; None for one that torch does not know."""
        return KINDS.get(self.kind)

    def empty(self) -> Tensor:
        """A tensor like it without numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """The tensor; raises CheckpointError naming the file if it ends before."""
        new = torch.empty(self.shape, dtype=self.dtype)
        with open(self.file, "rb", buffering=0) as handle:
            handle.seek(self.start)
            view, done = memory(new), 0
            while done < self.size:
                got = handle.readinto(view[done:])
                if not got:
                    raise _cut(self.file, self.start + done, f"the numbers of {self.key!r}")
                done += got
        return new

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, a few at a time; each is overwritten by the next."""
        room = memoryview(bytearray(min(CHUNK, self.size)))
        with open(self.file, "rb", buffering=0) as handle:
            handle.seek(self.start)
            left = self.size
            while left:
                got = handle.readinto(room[: min(left, len(room))])
                if not got:
                    raise _cut(self.file, self.stop - left, f"the numbers of {self.key!r}")
                left -= got
                yield room[:got]


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to be read or written; the tensor must be kept as long."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


# Headers ----------------------------------------------------------------------------------------------------


@dataclass
class Header:
    """What the beginning of a file says: its bytes, its remarks and its tensors in the order of their numbers."""

    raw: bytes
    remarks: dict[str, str]
    tensors: list[Stored]


def read_header(file: Path) -> Header:
    """The header of a file, checked against the file's size; raises CheckpointError naming the file and the fault."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        first = handle.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or 8 + min(length, HEADER_LIMIT) > size:
            raise _cut(file, size, "its header")
        if length > HEADER_LIMIT:
            raise _damaged(file, f"its header claims {length} bytes")
        raw = first + handle.read(length)
    try:
        table = json.loads(raw[8:])
        remarks = table.pop("__metadata__", {})
        tensors = [_stored(file, key, entry, 8 + length) for key, entry in table.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"its header is no table of tensors ({type(error).__name__}: {error})") from error
    tensors.sort(key=lambda s: (s.start, s.stop))
    _check_places(file, tensors, 8 + length, size)
    return Header(raw, dict(remarks or {}), tensors)


def _stored(file: Path, key: str, entry: dict[str, Any], base: int) -> Stored:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or start > stop:
        raise ValueError(f"{key!r} has the shape {shape} and the place {start} to {stop}")
    kind = KINDS.get(entry["dtype"])
    if kind is not None and math.prod(shape) * kind.itemsize != stop - start:
        raise ValueError(f"{key!r} has {stop - start} bytes for {shape} numbers of the kind {entry['dtype']}")
    return Stored(key, entry["dtype"], shape, file, base + start, base + stop)


def _check_places(file: Path, tensors: list[Stored], start: int, size: int) -> None:
    for s in tensors:
        if s.start != start:
            raise _damaged(file, f"{s.key!r} does not begin where the tensor before it ends")
        start = s.stop
    if start > size:
        first = next(s for s in tensors if s.stop > size)
        raise _cut(file, size, f"{first.key!r}, and {start} bytes are announced")
    if start < size:
        raise _damaged(file, f"{size - start} bytes follow its last tensor")


def _cut(file: Path, at: int, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is truncated: it ends after {at} bytes, within {what}. Download or copy it again.")


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is no safetensors file, or damaged: {what}. Download or copy it again.")


# Folders ----------------------------------------------------------------------------------------------------


@dataclass
class Shards:
    """The weights of a checkpoint folder, by file and by key; `index` is its index file, if it has one."""

    folder: Path
    files: dict[str, Header] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in self._names():
            self.files[name] = read_header(self.folder / name)
        self.tensors = {s.key: s for header in self.files.values() for s in header.tensors}
        if len(self.tensors) < sum(len(header.tensors) for header in self.files.values()):
            raise CheckpointError(
                f"Several shards of {self.folder} hold tensors of the same names. Download them again."
            )
        if self.index is not None:
            self._check_index(self.index["weight_map"])

    def _names(self) -> list[str]:
        file = self.folder / INDEX
        if not file.is_file():
            return [_only(self.folder)]
        try:
            self.index = json.loads(file.read_text(encoding="utf-8"))
            names = sorted(set(self.index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is no index of shards ({error}). Download or copy it again.") from error
        if odd := [n for n in names if Path(n).name != n]:
            raise CheckpointError(f"{file} names files outside its folder: {listing(odd)}. They are not read.")
        if missing := [n for n in names if not (self.folder / n).is_file()]:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of its {len(names)} shards: {listing(missing)}, which {INDEX} "
                "names. Download or copy them again."
            )
        return names

    def _check_index(self, places: dict[str, str]) -> None:
        held = {name: {s.key for s in header.tensors} for name, header in self.files.items()}
        wrong = [key for key, name in places.items() if key not in held[name]]
        if wrong:
            raise CheckpointError(
                f"{self.folder / INDEX} places {len(wrong)} tensors in shards that do not hold them: {listing(wrong)}. "
                "Index and shards are of different checkpoints: download them again."
            )


def _only(folder: Path) -> str:
    """The one file of a checkpoint without an index."""
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if SINGLE in found or len(found) == 1:
        return SINGLE if SINGLE in found else found[0]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if found:
        raise CheckpointError(f"{folder} holds {listing(found)}, but neither {SINGLE} nor {INDEX} to say which count.")
    hint = f" It holds the pickle {pickles[0]!r}: save the model as safetensors first." if pickles else ""
    raise CheckpointError(f"{folder} holds no safetensors weights ({SINGLE} or {INDEX}).{hint}")


# Writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A tensor of a file that is to be written."""

    key: str
    kind: str
    shape: tuple[int, ...]
    size: int


class ShardWriter:
    """Writes one file: its header first, then the tensors in any order. `sums` has a checksum of each tensor written.

    Arguments:
        file: where to.
        places: the tensors in the order of their numbers.
        header: the header of a file with the very same tensors, or None.
        remarks: the remarks, for a header of its own.
    """

    def __init__(self, file: Path, places: Iterable[Place], header: bytes | None, remarks: dict[str, str]):
        self.places = list(places)
        head = _header(self.places, remarks) if header is None else header
        self.offsets, end = {}, len(head)
        for place in self.places:
            self.offsets[place.key] = (end, end + place.size)
            end += place.size
        self.file, self.size, self.sums = file, end, {"": zlib.crc32(head)}
        self._handle = open(file, "wb", buffering=0)  # noqa: SIM115 - closed by `finish`
        self._put(head)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._handle.close()
        if kind is not None:
            self.file.unlink(missing_ok=True)

    def copy(self, stored: Stored) -> None:
        """Write a tensor as another file has it."""
        self._handle.seek(self.offsets[stored.key][0])
        total = 0
        for chunk in stored.chunks():
            self._put(chunk)
            total = zlib.crc32(chunk, total)
        self.sums[stored.key] = total

    def write(self, key: str, tensor: Tensor) -> None:
        """Write a tensor."""
        tensor = tensor.detach().contiguous()
        view, (start, stop) = memory(tensor), self.offsets[key]
        if len(view) != stop - start:
            raise AssertionError(f"{key} has {len(view)} bytes, and room for {stop - start}")
        self._handle.seek(start)
        for at in range(0, len(view), CHUNK):
            self._put(view[at : at + CHUNK])
        self.sums[key] = zlib.crc32(view)

    def finish(self) -> None:
        """Make sure that everything is on the disk."""
        lacking = [p.key for p in self.places if p.key not in self.sums]
        if lacking:
            raise AssertionError(f"{self.file} lacks {lacking}")
        os.fsync(self._handle.fileno())

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._handle.write(view) :]


def _header(places: list[Place], remarks: dict[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": remarks} if remarks else {}
    start = 0
    for place in places:
        table[place.key] = {
            "dtype": place.kind,
            "shape": list(place.shape),
            "data_offsets": [start, start + place.size],
        }
        start += place.size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def sums_of(file: Path) -> dict[str, int]:
    """The checksums of a file's header and tensors, as a writer has them."""
    header = read_header(file)
    sums = {"": zlib.crc32(header.raw)}
    for stored in header.tensors:
        total = 0
        for chunk in stored.chunks():
            total = zlib.crc32(chunk, total)
        sums[stored.key] = total
    return sums
