"""The head of a safetensors file: what it says of its tensors, checked before any of them is read.

A file is the length of its head (8 bytes, little-endian), the head (JSON), and the data, which the tensors fill without
gap or overlap. Nothing here takes more memory than the file has bytes of head, whatever it claims.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

LIMIT = 100_000_000  # bytes of a head, as the format has it
AXES = 64  # more than torch takes
META = "__metadata__"
CHECKSUM = "checksum"
CHUNK = 4096  # bytes that one factor of a checksum counts for

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: dict[str, torch.dtype] = {k: getattr(torch, v) for k, v in _NAMES.items() if hasattr(torch, v)}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Info(NamedTuple):
    """What the head says of one tensor; `begin` and `end` count bytes of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Layout(dict[str, Info]):
    """The tensors of a file by name. Files that say the same of theirs share one, and what is worked out of it."""

    @functools.cached_property
    def size(self) -> int:
        """The bytes of their data."""
        return max((info.end for info in self.values()), default=0)

    @functools.cached_property
    def names(self) -> str:
        """The part of the checksum that tells names, dtypes, shapes and places."""
        told = [[n, str(i.dtype), *i.shape, i.begin, i.end] for n, i in sorted(self.items())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @functools.cached_property
    def kind(self) -> torch.dtype | None:
        """The dtype of all tensors; None if there are several."""
        kinds = {info.dtype for info in self.values()}
        return kinds.pop() if len(kinds) == 1 else None

    @functools.cached_property
    def order(self) -> list[str]:
        """The names in the order of the data."""
        return sorted(self, key=lambda name: self[name][2:])

    @functools.cached_property
    def outline(self) -> dict[str, torch.Tensor]:
        """The tensors without their numbers, on the meta device."""
        return {name: torch.empty(i.shape, dtype=i.dtype, device="meta") for name, i in self.items()}

    @functools.cached_property
    def forms(self) -> list[torch.Tensor]:
        """Those of the outline in the order of the data."""
        return [self.outline[name] for name in self.order]

    @functools.cached_property
    def factors(self) -> torch.Tensor:
        """What each chunk of the data counts in the checksum, (chunks,) int64: the odd numbers."""
        return _odd(-(-self.size // CHUNK))


@functools.lru_cache(maxsize=8)
def _odd(count: int) -> torch.Tensor:
    return torch.arange(1, 2 * count + 1, 2, device="cpu")


class Header(NamedTuple):
    """A file's tensors, its own remarks, and where its data starts and the file ends."""

    tensors: Layout
    metadata: dict[str, str]
    start: int
    size: int


class _Fault(Exception):
    """What is wrong with a head; the caller adds the file."""


def read_header(file: str | os.PathLike[str]) -> Header:
    """The head of a safetensors file.

    Raises ValueError, naming the file and the cause, for what is no complete and consistent file.
    """
    with open(file, "rb", buffering=0) as handle:
        size, raw = os.fstat(handle.fileno()).st_size, handle.read(_FIRST)
        try:
            length = _length(raw[:8], size)
            while len(raw) < 8 + length and (more := handle.read(8 + length - len(raw))):
                raw += more
            tensors, metadata = _remembered(raw[8 : 8 + length], length, size - 8 - length)
        except _Fault as fault:
            raise ValueError(
                f"{file} is no complete safetensors file: {fault}. It may be truncated or damaged ({size} bytes): "
                "download or save it again."
            ) from None
    return Header(tensors, metadata, 8 + length, size)


def _length(first: bytes, size: int) -> int:
    if len(first) < 8:
        raise _Fault("it is shorter than the 8 bytes that start one")
    if first == b"version ":
        raise _Fault("it is the pointer that Git LFS leaves in its place; `git lfs pull` fetches the file itself")
    length = int.from_bytes(first, "little")
    if length > LIMIT:
        raise _Fault(f"its head would have {length} bytes, and {LIMIT} are allowed")
    if length > size - 8:
        raise _Fault(f"its head has {length} bytes, of which {size - 8} are there")
    return length


def _remembered(raw: bytes, length: int, size: int) -> tuple[Layout, dict[str, str]]:
    """As `_parsed`; heads that differ in nothing but the checksum are parsed once."""
    start = raw.find(_TOLD) + len(_TOLD)
    end = raw.find(b'"', start)
    told = raw[start:end]
    if start < len(_TOLD) or not told.replace(b"-", b"", 1).isalnum() or len(raw) != length or length > _LONG:
        return _parsed(raw, length, size)
    rest = raw[:start] + raw[end:]
    known = _heads.get(rest)
    if known is None or known[0].size != size:
        known = _heads[rest] = _parsed(raw, length, size)
        _let_go(_heads)
    return known[0], {**known[1], CHECKSUM: told.decode()}


def _parsed(raw: bytes, length: int, size: int) -> tuple[Layout, dict[str, str]]:
    """What a head says of `size` bytes of data; what follows the remarks is read once for files that say the same."""
    if len(raw) < length:
        raise _Fault("it became shorter while it was read")
    try:
        text = raw.decode("utf-8")
        found, rest = _known(text)
        head = {META: found} if rest in _layouts else json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"its head is no valid JSON ({error})") from None
    if not isinstance(head, dict):
        raise _Fault("its head is no JSON object")
    metadata = head.pop(META, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Fault(f"its {META} is no dictionary of texts")
    known = _layouts.get(rest)
    layout = Layout((name, _info(name, entry)) for name, entry in head.items()) if known is None else known
    if known is None or known.size != size:
        _check_data(layout, size)
    if rest and known is None:
        _layouts[rest] = layout
        _let_go(_layouts)
    return layout, metadata


_MOST = 8
_FIRST, _LONG = 2**14, 1_000_000  # bytes that are read at once, and of heads that are remembered at most
_TOLD = f'"{CHECKSUM}":"'.encode()
_heads: dict[bytes, tuple[Layout, dict[str, str]]] = {}  # by a sound head without its checksum
_layouts: dict[str, Layout] = {}  # by what follows the remarks in a head that was sound
_START = f'{{"{META}":{{'


def _let_go(kept: dict[Any, Any]) -> None:
    """Keep the last few; other threads may do so at the same time."""
    for key in list(kept)[:-_MOST]:
        kept.pop(key, None)


def _known(text: str) -> tuple[Any, str]:
    """A head's remarks, and what follows them; "" where they are not in front, or the rest is long."""
    if not text.startswith(_START) or len(text) > _LONG:
        return None, ""
    found, end = _remarks.raw_decode(text, len(_START) - 1)
    return found, text[end:].rstrip(" ")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Fault(f"its head has {_short(name)} twice")
        found[name] = value
    return found


_remarks = json.JSONDecoder(object_pairs_hook=_once)


def _short(value: Any) -> str:
    """A value as it is shown; files may hold texts of any length."""
    return f"{value!r:.120}"


def _info(name: str, entry: Any) -> Info:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Fault(f"the entry of {_short(name)} is not made of dtype, shape and data_offsets")
    name, kind, shape, offsets = _short(name), entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise _Fault(f"{name} has the dtype {_short(kind)}, which is not known")
    if not _counts(shape) or len(shape) > AXES:
        raise _Fault(f"{name} has the shape {_short(shape)}, which is none")
    if not _counts(offsets) or len(offsets) != 2:
        raise _Fault(f"{name} has the data_offsets {_short(offsets)}, which are no two positions")
    wanted, span = dtype.itemsize, 1
    for n in shape:
        wanted, span = wanted * n, span * max(n, 1)
        if span >= 2**62:
            raise _Fault(f"{name} has the shape {_short(shape)}, which no machine can hold")
    begin, end = offsets
    if end - begin != wanted:
        raise _Fault(f"{name} is {kind} {_short(shape)} and needs {wanted} bytes, but has {end - begin}")
    return Info(dtype, tuple(shape), begin, end)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)


def _check_data(tensors: Mapping[str, Info], size: int) -> None:
    """The tensors lie one behind the other and fill the data."""
    here = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if info.begin != here:
            what = "overlaps with the one before" if info.begin < here else "leaves a gap to the one before"
            raise _Fault(f"{_short(name)} {what} (it begins at {info.begin}, expected {here})")
        here = info.end
    if here != size:
        raise _Fault(f"its tensors need {here} bytes, and it holds {size} of them")
