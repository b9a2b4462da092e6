"""Several files that change together, or not at all.

New files are written into a folder beside the old ones. Then a list of what will move is put there, which makes them
valid at one moment: before it a crash leaves the old files, after it `current` finds the new ones wherever they are,
and the next save finishes the move. Folders for them are made with those above them or not at all, and what the system
refuses is told with its cause and its cure.

A crash is that of a process: what it has written is the system's, which writes it to the disk in its own time. With the
environment variable PEFT_DURABLE=1 each step waits for the disk, and holds when the power fails too.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UnwritableError

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
    with folders(target):
        yield from _staged(target)


def _staged(target: Path) -> Iterator[Path]:
    with writing(target):
        stage = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=os.fspath(target)))
    try:
        with _named(target):
            yield stage
        moving = _complete(stage)
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


def durable() -> bool:
    """Whether files are to be on the disk, and not only the system's, before they count."""
    return os.environ.get("PEFT_DURABLE", "") not in ("", "0", "false", "False")


def _complete(stage: Path) -> list[str]:
    """The names of a folder's files, which have the usual permissions now, and are on the disk where that is asked."""
    with os.scandir(stage) as found:
        files = [(e.name, stat.S_IMODE(e.stat().st_mode)) for e in found if e.is_file()]
    names = sorted((name for name, _ in files), key=lambda name: (name.endswith(".json"), name))
    if len({mode for _, mode in files}) > 1 or any(mode == _PRIVATE for _, mode in files):
        mode = _usual(stage)
        for name, own in files:
            if own != mode:
                os.chmod(stage / name, mode)
    for name in names if durable() else ():
        with writing(stage.parent / name), open(stage / name, "rb+") as handle:
            os.fsync(handle.fileno())
    return names


_PRIVATE = stat.S_IRUSR | stat.S_IWUSR  # of files that safetensors makes, and `tempfile`


def _usual(folder: Path) -> int:
    """The permissions of a new file."""
    file = os.path.join(folder, ".usual")
    with open(file, "wb") as handle:
        mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
    os.unlink(file)
    return mode


def _replaced(target: Path, moving: list[str]) -> list[str]:
    if not any(WEIGHTS.fullmatch(name) for name in moving):
        return []
    return [name for name in os.listdir(target) if WEIGHTS.fullmatch(name) and name not in moving]


def _put_list(stage: Path, moving: list[str], replaced: list[str]) -> None:
    draft = os.path.join(stage, f".{LIST}")
    with open(draft, "w", encoding="utf-8") as handle:
        json.dump({"moving": moving, "replaced": replaced}, handle)
        handle.flush()
        if durable():
            os.fsync(handle.fileno())
    os.replace(draft, os.path.join(stage, LIST))
    flush_folder(stage)


def _finish(stage: Path, target: Path, moving: list[str], replaced: list[str]) -> None:
    for name in moving:
        here = os.path.join(stage, name)
        with suppress(FileNotFoundError):  # another process has moved it
            os.replace(here, os.path.join(target, name))
    for name in replaced:
        with suppress(FileNotFoundError):
            (target / name).unlink()
    flush_folder(target)
    _take_away(stage)


def _take_away(stage: Path) -> None:
    """Remove a folder in which nothing but the list is left, or whatever else a crash has left."""
    try:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(stage, LIST))
        os.rmdir(stage)
    except OSError:
        shutil.rmtree(stage, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Put a folder's list of files on the disk, where that is asked and the system has such a thing."""
    if os.name != "posix" or not durable():
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
        if listed is None and not _is_at_work(stage):
            shutil.rmtree(stage, ignore_errors=True)
        elif listed is not None:
            _finish(stage, Path(folder), *listed)


def _is_at_work(stage: Path) -> bool:
    """Whether the process that made a folder still runs here: several may save to one place at the same time."""
    maker = stage.name.removeprefix(PREFIX).partition("-")[0]
    if os.name != "posix" or not maker.isdigit():
        return False
    try:
        os.kill(int(maker), 0)  # asks, and does nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


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
        found = [name for name in os.listdir(folder) if name.startswith(PREFIX)]
    except OSError:
        return []
    return sorted(path for path in (Path(folder, name) for name in found) if path.is_dir()) if found else []


def _listed(stage: Path) -> tuple[list[str], list[str]] | None:
    """What moves and what goes; None if the new files are not complete."""
    try:
        found = json.loads((stage / LIST).read_text(encoding="utf-8"))
        moving, replaced = ([str(name) for name in found[key]] for key in ("moving", "replaced"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    here = {p.name for p in stage.iterdir() if p.is_file() and p.name != LIST}
    return [n for n in moving if n in here], [n for n in replaced if WEIGHTS.fullmatch(n)]


# Folders to write into ------------------------------------------------------------------------------------------------

Place = str | os.PathLike[str]
_FILE = (
    "a part of the path is a file, or a link that leads nowhere, where a folder is needed",
    "Choose another path, or move it away",
)
_LEAVE = "there is no permission to write there", "Choose another folder, or ask its owner for permission"
_FULL = "the disk is full", "Free some space, or choose a folder on another disk"
_LARGE = "the file is larger than may be written there", "Raise the limit, or choose a folder on another disk"
_FAULT = "the disk reports a fault", "Check it, or choose a folder on another one"
_CAUSES = {
    errno.ENOTDIR: _FILE,
    errno.EEXIST: _FILE,
    errno.EISDIR: ("it is a folder, where a file is needed", "Choose another path"),
    errno.EACCES: _LEAVE,
    errno.EPERM: _LEAVE,
    errno.EROFS: ("the file system can only be read", "Choose a folder on another one"),
    errno.ENAMETOOLONG: ("a name in it is longer than the file system takes", "Choose a shorter one"),
    errno.ELOOP: ("its links lead in a circle", "Choose another path"),
    errno.ENOENT: ("a folder on the way to it cannot be made", "Choose another path"),
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _LARGE,
    errno.EIO: _FAULT,
}


_WHILE_WRITING = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])


@contextmanager
def writing(place: Place) -> Iterator[None]:
    """What the system refuses inside is an UnwritableError: the path, the cause and what to do."""
    if "\0" in os.fspath(place):
        raise refusal(place, "a path holds no null character", "Take it out", errno.EINVAL)
    try:
        yield
    except UnwritableError:
        raise
    except UnicodeEncodeError as error:
        cause = f"names of files are in {error.encoding!r} here, which lacks some of its characters"
        raise refusal(place, cause, "Choose another name, or start Python with -X utf8", errno.EILSEQ) from error
    except OSError as error:
        known = _CAUSES.get(error.errno or 0)
        if known is None:
            raise
        raise refusal(place, *known, error.errno) from error


@contextmanager
def _named(place: Place) -> Iterator[None]:
    """What a disk refuses while numbers are written, which the system tells without a path, as `writing` tells it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        while error.__context__ is not None and not isinstance(error, OSError):  # torch hides it behind its own
            error = error.__context__  # type: ignore[assignment]
        if getattr(error, "filename", None) is None and getattr(error, "errno", None) in _WHILE_WRITING:
            raise refusal(place, *_CAUSES[error.errno], error.errno) from error  # type: ignore[union-attr,index]
        raise


def refusal(place: Place, cause: str, cure: str, number: int | None) -> UnwritableError:
    """The error for a path that cannot be written."""
    error = UnwritableError(f"{shown(place)} cannot be written: {cause}. {cure}. Nothing was written there.")
    error.errno = number
    return error


def shown(place: Place) -> str:
    """A path as it is told; one may be of any length."""
    text = os.fspath(place)
    return repr(text) if len(text) <= 300 else f"{text[:300]!r}... ({len(text)} characters)"


def make_folders(*places: Place) -> list[Path]:
    """Make folders, with those above them; returns what was not there, innermost first.

    Raises UnwritableError; what was made until then is taken away again.
    """
    made: list[Path] = []
    try:
        for place in places:
            with writing(place):
                if os.path.isdir(place):
                    continue
                path = Path(place)
                missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
                for folder in reversed(missing):
                    if _made(folder):
                        made.insert(0, folder)
                path.mkdir(exist_ok=True)  # a file, or a link that leads nowhere, is told
    except BaseException:
        remove_folders(made)
        raise
    return made


def _made(folder: Path) -> bool:
    """Whether a folder was made here; False if another process has made it meanwhile."""
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def remove_folders(made: list[Path]) -> None:
    """Take folders away again, as far as they are empty."""
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def folders(*places: Place) -> Iterator[None]:
    """Folders for what is written inside; if that fails, those that were not there before are taken away again."""
    made = make_folders(*places)
    try:
        yield
    except BaseException:
        remove_folders(made)
        raise


def check_writable(place: Place) -> None:
    """Raise UnwritableError for what can be seen without writing: a file on the way, or no permission."""
    path = Path(place)
    with writing(place):
        above = path if _there(path) else next(filter(_there, path.absolute().parents), path)
        if above.is_dir() and not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(above))
        if above != path and not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(above))


def _there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
