"""Several files that change together, or not at all.

New files are written into a folder beside the old ones and flushed to the disk. Then a list of what will move is put
there, which makes them valid at one moment: before it a crash leaves the old files, after it `current` finds the new
ones wherever they are, and the next save finishes the move.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".saving-"
LIST = "moving.json"
# Files that stand for each other: those of an earlier save go when others come.
WEIGHTS = re.compile(r"adapter_model(-\d+-of-\d+)?\.(bin|safetensors|safetensors\.index\.json)")


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder inside `folder` whose files move into place together once the block has succeeded.

    A crash or an exception inside the block leaves the files of `folder` as they were. New weights take the place of
    all old ones, in whatever format those are.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=PREFIX, dir=target))
    try:
        yield stage
        moving = _flushed(stage)
        replaced = _replaced(target, moving)
        if len(moving) + len(replaced) > 1:
            _put_list(stage, moving, replaced)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    try:
        _finish(stage, target, moving, replaced)
    except OSError:
        if all((stage / name).exists() for name in moving):  # nothing has moved: the old files hold
            (stage / LIST).unlink(missing_ok=True)
            shutil.rmtree(stage, ignore_errors=True)
        raise


def _flushed(stage: Path) -> list[str]:
    """The names of a folder's files, which are on the disk now and have the usual permissions."""
    files = sorted((p for p in stage.iterdir() if p.is_file()), key=lambda p: (p.suffix == ".json", p.name))
    usual = stage / ".usual"
    usual.touch()
    for file in files:
        shutil.copymode(usual, file)  # safetensors makes files that only their owner can read
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    usual.unlink()
    return [file.name for file in files]


def _replaced(target: Path, moving: list[str]) -> list[str]:
    if not any(WEIGHTS.fullmatch(name) for name in moving):
        return []
    return [p.name for p in target.iterdir() if WEIGHTS.fullmatch(p.name) and p.name not in moving]


def _put_list(stage: Path, moving: list[str], replaced: list[str]) -> None:
    draft = stage / f".{LIST}"
    with open(draft, "w", encoding="utf-8") as handle:
        json.dump({"moving": moving, "replaced": replaced}, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(draft, stage / LIST)
    flush_folder(stage)


def _finish(stage: Path, target: Path, moving: list[str], replaced: list[str]) -> None:
    for name in moving:
        if (stage / name).exists():
            os.replace(stage / name, target / name)
    for name in replaced:
        with suppress(FileNotFoundError):
            (target / name).unlink()
    flush_folder(target)
    shutil.rmtree(stage, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Put a folder's list of files on the disk, where the system has such a thing."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# After a crash ------------------------------------------------------------------------------------------------------


def settle(folder: str | os.PathLike[str]) -> None:
    """Finish a move that a crash has interrupted, and remove what a crash has left half-written."""
    for stage in _stages(folder):
        listed = _listed(stage)
        if listed is None:
            shutil.rmtree(stage, ignore_errors=True)
        else:
            _finish(stage, Path(folder), *listed)


def current(folder: str | os.PathLike[str], name: str) -> str | None:
    """The path of a file that counts in a folder, None if there is none: a move may have been interrupted."""
    for stage in _stages(folder):
        moving, replaced = _listed(stage) or ([], [])
        if name in replaced:
            return None
        if name in moving and (stage / name).is_file():
            return str(stage / name)
    path = os.path.join(folder, name)
    return path if os.path.isfile(path) else None


def _stages(folder: str | os.PathLike[str]) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(Path(e.path) for e in found if e.name.startswith(PREFIX) and e.is_dir())
    except OSError:
        return []


def _listed(stage: Path) -> tuple[list[str], list[str]] | None:
    """What moves and what goes; None if the new files are not complete."""
    try:
        found = json.loads((stage / LIST).read_text(encoding="utf-8"))
        moving, replaced = ([str(name) for name in found[key]] for key in ("moving", "replaced"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    here = {p.name for p in stage.iterdir() if p.is_file() and p.name != LIST}
    return [n for n in moving if n in here], [n for n in replaced if WEIGHTS.fullmatch(n)]
