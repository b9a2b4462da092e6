"""Safetensors files tensor by tensor: headers first, numbers only when asked for, nothing mapped into memory."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.header import DTYPES, read_header
from ..errors import PeftError, listing

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CHUNK = 16 * 2**20  # bytes that are copied at a time
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


class CheckpointError(PeftError, ValueError):
    """A checkpoint, or a folder for one, that cannot be used as it is."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `start` and `stop` are offsets in the file."""

    key: str
    dtype: torch.dtype
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
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(one == two for one, two in zip(self.chunks(), other.chunks(), strict=True))

    def empty(self) -> Tensor:
        """A tensor like it without numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """The tensor; raises CheckpointError naming the file if it ends before."""
        new = room(self.shape, self.dtype)
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


def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in memory of its own, which goes back to the system at once when the tensor goes.

    The allocator keeps freed blocks of up to 32 MiB, and in the gaps between them nothing larger has room.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < 2**20 or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to be read or written; the tensor must be kept as long."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


@dataclass
class Header:
    """What the beginning of a file says: its bytes, its remarks and its tensors in the order of their numbers.

    There are no bytes where tensors have other names than in the file.
    """

    raw: bytes | None
    remarks: dict[str, str]
    tensors: list[Stored]

    @classmethod
    def of(cls, file: Path) -> Header:
        """The header of a file, checked; raises CheckpointError naming the file and the fault."""
        try:
            found = read_header(file)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        with open(file, "rb") as handle:
            raw = handle.read(found.start)
        tensors = [
            Stored(key, info.dtype, info.shape, file, found.start + info.begin, found.start + info.end)
            for key, info in found.tensors.items()
        ]
        return cls(raw, found.metadata, sorted(tensors, key=lambda s: (s.start, s.stop)))


def _cut(file: Path, at: int, what: str) -> CheckpointError:
    return CheckpointError(f"{file} became shorter while it was read: it ends after {at} bytes, within {what}.")


# Folders ----------------------------------------------------------------------------------------------------


@dataclass
class Shards:
    """The weights of a checkpoint folder, by file and by key; `index` is its index file, if it has one."""

    folder: Path
    files: dict[str, Header] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.files:
            self.tensors = {s.key: s for header in self.files.values() for s in header.tensors}
            return
        for name in self._names():
            self.files[name] = Header.of(self.folder / name)
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
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


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
            "dtype": KINDS[place.dtype],
            "shape": list(place.shape),
            "data_offsets": [start, start + place.size],
        }
        start += place.size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def sums_of(file: Path) -> dict[str, int]:
    """The checksums of a file's header and tensors, as a writer has them."""
    header = Header.of(file)
    sums = {"": zlib.crc32(header.raw or b"")}
    for stored in header.tensors:
        total = 0
        for chunk in stored.chunks():
            total = zlib.crc32(chunk, total)
        sums[stored.key] = total
    return sums
