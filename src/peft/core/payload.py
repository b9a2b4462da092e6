"""The numbers of a safetensors file: read, written, and held against their checksum."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from .header import CHECKSUM, CHUNK, CODES, META, Header, Info, Layout

BLOCK = 2**20  # bytes of memory that wait for the next file; larger files are looked at where they are
BLANK = "0" * 33
SUMMED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of which one sum tells whether all are finite

_waiting: list[tuple[memoryview, Tensor]] = []
_clones = getattr(torch, "_foreach_clone", None) or (lambda tensors: [t.clone() for t in tensors])


def finite(t: Tensor) -> bool:
    """Whether all numbers are finite. If their sum is, they are; if not, it may have left its range."""
    t = t if t.element_size() > 1 else t.float()
    if math.isfinite(t.sum().item()):
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(t))).all())  # both of which are NaN if any number is


# Reading ------------------------------------------------------------------------------------------------------------


def data_of(file: str | os.PathLike[str], header: Header) -> Tensor:
    """A file's data as bytes, (size,): pages of it are read when they are looked at."""
    if os.path.getsize(file) < header.size:
        raise _shorter(file)
    whole = torch.from_file(os.fspath(file), shared=False, size=header.size, dtype=torch.uint8)
    return whole[header.start :]


def _shorter(file: str | os.PathLike[str]) -> ValueError:
    return ValueError(f"{file} became shorter while it was read. Download or save it again.")


@contextmanager
def at_hand(file: str | os.PathLike[str], header: Header) -> Iterator[tuple[Tensor, bool]]:
    """A file's data as bytes, (size or more,), and whether their memory is lent and may not be looked at afterwards.

    What stands behind the data are zeros. Raises ValueError for a file that is shorter now than its head says.
    """
    size = header.tensors.size
    if size > BLOCK:
        yield data_of(file, header), False
        return
    with _block() as (memory, data):
        _read(file, header, memory[:size])
        yield data[: _padded(memory, size)], True


@contextmanager
def _block() -> Iterator[tuple[memoryview, Tensor]]:
    """Memory of `BLOCK` bytes, with any numbers in it: pages that have been touched come cheaper than new ones."""
    try:
        block = _waiting.pop()
    except IndexError:
        raw = bytearray(BLOCK)
        block = memoryview(raw), torch.frombuffer(raw, dtype=torch.uint8)
    try:
        yield block
    finally:
        if not _waiting:
            _waiting.append(block)


def _padded(memory: memoryview, size: int) -> int:
    """The end of the last chunk, up to which zeros are filled in."""
    end = size + -size % CHUNK
    memory[size:end] = bytes(end - size)
    return end


def _read(file: str | os.PathLike[str], header: Header, memory: memoryview) -> None:
    with open(file, "rb", buffering=0) as handle:
        handle.seek(header.start)
        while memory:
            count = handle.readinto(memory)
            if not count:
                raise _shorter(file)
            memory = memory[count:]


def tensors_of(data: Tensor, header: Header, own: bool = False) -> dict[str, Tensor]:
    """The tensors in a file's data.

    Arguments:
        data: as `data_of` or `at_hand` gives it.
        header: of the file.
        own: each in memory of its own; otherwise without a copy where their place in the file allows that.
    """
    layout = header.tensors
    if (numbers := numbers_of(data, header)) is not None:
        parts = _unflatten_dense_tensors(numbers, layout.forms)
        return dict(zip(layout.order, _clones(parts) if own else parts, strict=True))
    return {name: _tensor(data, info, own) for name, info in layout.items()}


def _tensor(data: Tensor, info: Info, own: bool) -> Tensor:
    raw = data[info.begin : info.end]
    raw = raw.clone() if own or raw.storage_offset() % info.dtype.itemsize else raw
    return raw.view(info.dtype).view(info.shape)


def numbers_of(data: Tensor, header: Header) -> Tensor | None:
    """All numbers of a file as one row, if they are of one dtype and lie where it allows that."""
    kind = header.tensors.kind
    if kind is None or data.storage_offset() % kind.itemsize:
        return None
    return data[: header.tensors.size].view(kind)


# Writing ------------------------------------------------------------------------------------------------------------


def write_file(file: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Write a safetensors file with its checksum; the same tensors and remarks always give the same bytes.

    Returns whether its numbers are finite for sure: their sums are, and they are of one dtype.

    Arguments:
        file: the path.
        tensors: name -> tensor on any device; memory for one of them is needed beyond those on the CPU.
        metadata: remarks.

    Raises ValueError for a dtype or a name that the format does not have.
    """
    infos, total = _laid_out(tensors), 0
    head: dict[str, Any] = {META: dict(sorted({**metadata, CHECKSUM: BLANK}.items()))}
    for name, (dtype, shape, begin, end) in infos.items():
        head[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (begin, end)}
    raw = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    raw = raw.ljust(-(-len(raw) // 8) * 8)
    kind, sure = infos.kind, infos.kind in SUMMED
    with open(file, "wb") as handle, _block() as (memory, data):
        handle.write(len(raw).to_bytes(8, "little") + raw)
        for first, size in _filled(data.data_ptr(), [tensors[name] for name in infos]):
            total += _sum(data[: _padded(memory, size)], infos.factors[first // CHUNK :])
            sure = sure and kind is not None and math.isfinite(data[:size].view(kind).sum().item())
            handle.write(memory[:size])
        handle.seek(8 + raw.index(f'"{CHECKSUM}":"{BLANK}"'.encode()) + len(CHECKSUM) + 4)
        handle.write(_told(infos, total).encode())
    return sure


def _laid_out(tensors: Mapping[str, Tensor]) -> Layout:
    """Where each tensor goes: those with the largest numbers first, so that every one is aligned."""
    infos, here = Layout(), 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        if name == META or tensor.dtype not in CODES:
            raise ValueError(f"A safetensors file cannot hold {name!r} of {tensor.dtype}. Convert or rename it.")
        end = here + tensor.nbytes
        infos[name] = Info(tensor.dtype, tuple(tensor.shape), here, end)
        here = end
    infos.__dict__["size"] = here
    return infos


def _filled(address: int, tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Copy the tensors' bytes into a block again and again; each time it is full, where that begins and its size."""
    first = here = 0
    for tensor in tensors:
        held = tensor if tensor.is_cpu and tensor.is_contiguous() else tensor.detach().cpu().contiguous()
        place, left = held.data_ptr(), held.nbytes
        while left:
            count = min(left, BLOCK - here)
            ctypes.memmove(address + here, place, count)
            place, left, here = place + count, left - count, here + count
            if here == BLOCK:
                yield first, here
                first, here = first + here, 0
    if here:
        yield first, here


# The checksum -------------------------------------------------------------------------------------------------------


def checksum(data: Tensor, header: Header) -> str:
    """Of a file's names, dtypes, shapes and data: any flipped bit, and any pages that changed places, change it.

    Two sums of 64 bits: SHA-256 of the head, cut; and of the data's words, each chunk of 4 KiB with an odd factor of
    its own, modulo 2^64. It finds damage, and is no proof against intent.
    """
    return _told(header.tensors, _sum(data, header.tensors.factors))


def _told(layout: Layout, total: int) -> str:
    return f"{layout.names}-{total % 2**64:016x}"


def _sum(data: Tensor, factors: Tensor) -> int:
    """The sum over bytes, (size,), behind which zeros may stand; the first chunk has the first of the factors."""
    count, rest = divmod(data.numel(), CHUNK)
    if rest:
        last = F.pad(data[count * CHUNK :], (0, CHUNK - rest))
        return _sum(last, factors[count:]) + _sum(data[: count * CHUNK], factors)
    if data.storage_offset() % 8:
        data = data.clone()
    return int(data.view(torch.int64).view(count, CHUNK // 8).sum(1).dot(factors[:count]))


def is_sound(data: Tensor, header: Header) -> bool:
    """Whether a file's tensors are those that its checksum was taken of; True for a file without one."""
    told = header.metadata.get(CHECKSUM)
    return told is None or told == checksum(data, header)
