"""What has been finished: a file beside the output that survives the process, and tells which shards are whole."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from .. import version
from ..core.commit import folders, writing
from .shards import CheckpointError, sums_of


class Journal:
    """The record of one merge, and the folder where it is made until it is whole.

    Arguments:
        out: the final folder; the record and the unfinished folder stand beside it.
        task: what is merged, as plain data; a record of something else is not gone on from.
    """

    def __init__(self, out: Path, task: dict[str, Any]):
        self.out, self.task = out, task
        self.file, self.stage = places(out)
        self.done: dict[str, dict[str, int]] = {}

    def __enter__(self) -> Journal:
        with folders(self.out.parent), writing(self.out):
            self._handle = open(self.file, "a+", encoding="utf-8")
        try:
            _lock(self._handle, self.out)
        except BaseException:
            self._handle.close()
            raise
        self._handle.seek(0)
        text = self._handle.read()
        lines = _lines(text)
        if text and not text.endswith("\n"):
            self._handle.write("\n")  # after a line that was cut
        if lines[:1] != [self.task]:
            shutil.rmtree(self.stage, ignore_errors=True)
            self._handle.truncate(0)
            self._append(self.task)
            lines = []
        with writing(self.out):
            self.stage.mkdir(exist_ok=True)
        self.done = {line["file"]: line["sums"] for line in lines[1:] if self._whole(line)}
        for file in self.stage.iterdir():
            if file.name not in self.done:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._handle.close()
        again = kind is not None and issubclass(kind, Exception) and not issubclass(kind, (OSError, MemoryError))
        if again or (kind is not None and not self.done):  # it would fail again, or has nothing to go on from
            shutil.rmtree(self.stage, ignore_errors=True)
            self.file.unlink(missing_ok=True)

    def _whole(self, line: dict[str, Any]) -> bool:
        """Whether a finished file is there as it was written."""
        file = self.stage / line["file"]
        if not file.is_file() or file.stat().st_size != line["size"]:
            return False
        try:
            return sums_of(file) == line["sums"]
        except CheckpointError:
            return False

    def finished(self, name: str, size: int, sums: dict[str, int]) -> None:
        """Note that a file is whole and on the disk."""
        self.done[name] = sums
        self._append({"file": name, "size": size, "sums": sums})

    def _append(self, line: dict[str, Any]) -> None:
        self._handle.write(json.dumps(line) + "\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def publish(self) -> None:
        """Give the folder its final name, at once, and forget the record."""
        flush_folder(self.stage)
        if self.out.is_dir():
            self.out.rmdir()  # empty, or it fails
        os.replace(self.stage, self.out)
        flush_folder(self.out.parent)
        self.file.unlink(missing_ok=True)


def places(out: Path) -> tuple[Path, Path]:
    """Where the record of a merge to a folder is, and where the folder is made."""
    return out.parent / f".{out.name}.merging.json", out.parent / f".{out.name}.merging"


def sweep(out: Path) -> None:
    """Forget the record of a merge that ended after its folder had its name."""
    file, stage = places(out)
    if file.exists() and out.exists() and not stage.exists():
        file.unlink()


def _lines(text: str) -> list[Any]:
    """What a record says; lines that were cut are left out."""
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _lock(handle: Any, out: Path) -> None:
    """Keep other processes from merging to the same folder; the system lets go when the process ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CheckpointError(f"Another process is merging to {out}. Wait for it, or choose another folder.") from error


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    with ExitStack() as stack:
        if os.name == "posix":  # elsewhere folders are no files
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            os.fsync(handle)


def fingerprint(file: Path) -> list[int]:
    """Size and checksum of a file."""
    total, size = 0, 0
    with open(file, "rb") as handle:
        while chunk := handle.read(2**20):
            total, size = zlib.crc32(chunk, total), size + len(chunk)
    return [size, total]


def task_of(shards: Iterable[Path], small: Iterable[Path], weights: list[float], model: str) -> dict[str, Any]:
    """What is merged: two merges with the same description write the same bytes.

    Arguments:
        shards: the base's weights, told by size and time.
        small: files told by their contents.
        weights: of the adapters.
        model: the class of the model.
    """
    import torch

    return {
        "version": [version.__version__, torch.__version__],
        "base": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in shards],
        "files": [[str(f.resolve()), *fingerprint(f)] for f in small],
        "weights": weights,
        "model": model,
    }
