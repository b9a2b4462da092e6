"""`merge_checkpoint`: adapters merged into the files of a base model, without the model."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.commit import check_writable
from . import placing, replicas, skeleton
from .compute import Computer
from .journal import Journal, flush_folder, sweep, task_of
from .names import Group, Names
from .outcome import Outcome
from .packed import refuse_packed
from .plan import FilePlan, Plan, settings
from .shards import INDEX, CheckpointError, Shards, ShardWriter

Folder = str | os.PathLike[str]
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
CONFIG = skeleton.CONFIG


@dataclass(frozen=True)
class Merged:
    """What a merge has done.

    Attributes:
        folder: the merged checkpoint.
        changed: keys of the tensors that differ from the base's.
        added: keys that the base's files did not have.
        left: files of the base that were not copied.
        size: bytes of all tensors.
        resumed: files that an earlier, interrupted merge had finished.
    """

    folder: Path
    changed: list[str]
    added: list[str]
    left: list[str]
    size: int
    resumed: list[str]


def merge_checkpoint(
    base: Folder,
    adapter: Folder | Sequence[Folder],
    out: Folder,
    weights: Sequence[float] | None = None,
    model: nn.Module | None = None,
    progressbar: bool = False,
) -> Merged:
    """Merge adapters into the checkpoint of a base model, from files to files.

    The bits are those of loading the base in the dtypes of its files, the adapters onto it, `merge_and_unload()` and
    saving. The model itself is never in memory: beyond the adapters, at most twice its largest tensor and 300 MB are.
    A merge that was interrupted goes on where it was when it is called again; `out` appears when it is whole.

    Arguments:
        base: folder of the base model: safetensors and config.json.
        adapter: folder of the adapter, or of several, which are merged in this order.
        out: a new folder. It gets the weights in files of the same names, and the base's other files.
        weights: one for each adapter, which multiplies what it adds, as `set_scale` does; None: 1 each.
        model: a model of the base's class, of which only the structure is used; needed where config.json does not name
            a class of transformers.
        progressbar: show progress.

    Raises CheckpointError (a ValueError) for files and folders that do not fit, UnwritableError (an OSError) for an
    output that cannot be written, OSError if the disk is too small, and what loading an adapter raises. Nothing is
    written before all of that is known.
    """
    base, out = Path(base), Path(out)
    adapters = [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)
    factors = _weights(adapters, weights)
    _check_folders(base, out, adapters)
    _check_once(adapters)
    shards = Shards(base)
    sources = placing.read(adapters, factors)
    plan = _planned(base, shards, sources, model)
    small = [base / CONFIG] if (base / CONFIG).is_file() else []
    small += [p for a in map(Path, adapters) for p in sorted(a.glob("adapter_*")) if p.is_file()]
    task = task_of([base / n for n in shards.files], small, factors, type(plan.outcome.model).__name__)
    others, left = _others(base)
    with Journal(out, task) as journal:
        resumed = [f.name for f in plan.files if f.name in journal.done]
        _check_room(plan, journal, others)
        with _told(out):
            _write_all(plan, Computer(plan.names), journal, progressbar)
            _finish(base, plan, others, journal)
    changed, added = plan.told(shards)
    return Merged(out, changed, added, left, sum(f.size for f in plan.files), resumed)


# Before ---------------------------------------------------------------------------------------------------


def _weights(adapters: list[Folder], weights: Sequence[float] | None) -> list[float]:
    if not adapters:
        raise CheckpointError("No adapter is given to merge.")
    factors = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(factors) != len(adapters):
        raise CheckpointError(f"{len(adapters)} adapters need as many weights, but {len(factors)} are given.")
    if not all(map(math.isfinite, factors)):
        raise CheckpointError(f"weights={factors}: a weight must be a finite number, such as 0.5.")
    return factors


def _check_folders(base: Path, out: Path, adapters: Sequence[Folder]) -> None:
    check_writable(out)
    if not base.is_dir():
        raise CheckpointError(
            f"The base {str(base)!r} is no folder. Download the model first (`hf download NAME --local-dir FOLDER`)."
        )
    for other, what in ((base, "base"), *((Path(a), "adapter") for a in adapters)):
        inside, around = (p.resolve() for p in (out, other))
        if inside == around or inside in around.parents or around in inside.parents:
            raise CheckpointError(
                f"The output {str(out)!r} is, or lies in or around, the {what}: choose another folder."
            )
    sweep(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"The output {str(out)!r} exists already. Choose a new folder, or delete it first.")


def _check_once(adapters: Sequence[Folder]) -> None:
    """Refuse a folder that is given twice: its update would be added twice, which is hardly meant."""
    seen: set[Path] = set()
    for place in adapters:
        path = Path(place).resolve()
        if path in seen:
            raise CheckpointError(
                f"The adapter {os.fspath(place)!r} is given twice, and would be added twice. Give it once; to add "
                "its update twice, give it once with the weight 2 (--weight 2, one weight for each adapter)."
            )
        seen.add(path)


def _planned(base: Path, shards: Shards, sources: list[placing.Source], model: nn.Module | None) -> Plan:
    """What is to be written; no base tensor is read, but for tied ones, and those from which V of FRoD comes."""
    refuse_packed(base, skeleton.read_config(base), shards.tensors)
    if model is None:
        shapes = {k: tuple(t.shape) for source in sources for k, t in source.saved.outline.items()}
        bare = skeleton.skeleton(base, shards.tensors, sources[0].config, shapes)
    else:
        bare = skeleton.emptied(model)
    names, ranges = Names(bare, shards.tensors), replicas.ranges_of(sources)
    changes: dict[str, Any] = {}
    if ranges:
        shards, changes = replicas.widened(names, shards, ranges)
        names = Names(bare, shards.tensors)
    computer = Computer(names)
    tuner = placing.place(bare, sources, computer.seen)
    outcome = Outcome(tuner, names.places, [s.name for s in sources], computer.equal)
    return Plan(shards, names, outcome, changes)


def _others(base: Path) -> tuple[list[Path], list[str]]:
    """The base's files that are copied, and the names of those that are not."""
    files = sorted(p for p in base.iterdir() if p.is_file() and not p.name.startswith("."))
    weights = [p for p in files if p.name.endswith(WEIGHTS)]
    left = [p.name for p in weights if not p.name.endswith((".safetensors", ".safetensors.index.json"))]
    left += sorted(f"{p.name}/" for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [p for p in files if p not in weights], left


def _check_room(plan: Plan, journal: Journal, others: list[Path]) -> None:
    needed = sum(f.size for f in plan.files if f.name not in journal.done)
    needed += sum(p.stat().st_size for p in others) + 2**20
    free = shutil.disk_usage(journal.stage).free
    if free < needed:
        text = (
            f"The merged model needs {needed / 1e9:.2f} GB more on the disk of {journal.out}, and {free / 1e9:.2f} GB "
            "are free. Free some, or choose an output on another disk"
        )
        raise OSError(errno.ENOSPC, text)


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """Say what is left after a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        text = f"The disk of {out} is full. What is finished is kept: free some space and call the merge again"
        raise OSError(errno.ENOSPC, text) from error


# Writing --------------------------------------------------------------------------------------------------


def _write_all(plan: Plan, computer: Computer, journal: Journal, progressbar: bool) -> None:
    total = sum(f.size for f in plan.files)
    with progress(total, progressbar) as advance:
        for file in plan.files:
            if file.name in journal.done:
                advance(file.size)
                continue
            header = plan.shards.files[file.name]
            path = journal.stage / file.name
            with ShardWriter(path, file.places, None if file.added else header.raw, header.remarks) as writer:
                _write(file, plan, computer, writer, advance)
                writer.finish()
            flush_folder(journal.stage)
            journal.finished(file.name, writer.size, writer.sums)


def _write(file: FilePlan, plan: Plan, computer: Computer, writer: ShardWriter, advance: Any) -> None:
    order: list[tuple[int, Any]] = [(s.start, s) for s in file.copied]
    order += [(plan.names.tensors[group.keys[0]].start, group) for group in file.groups]
    for _, item in sorted(order, key=lambda pair: pair[0]):
        if isinstance(item, Group):
            _write_group(item, plan, computer, writer, advance)
        else:
            writer.copy(item)
            advance(item.size)
    for key, value in file.added:
        tensor = computer.merged(value)
        writer.write(key, tensor)
        advance(tensor.numel() * tensor.element_size())


def _write_group(group: Group, plan: Plan, computer: Computer, writer: ShardWriter, advance: Any) -> None:
    """Compute the tensors that a group makes, and write those of the files that belong here."""
    values = plan.outcome.values
    made: dict[str, Any] = {}
    needed = any(n not in values or values[n].own is None for n in group.names)
    raw = computer.base(group) if needed else {}
    for name in group.names:
        value, start = values.get(name), raw.pop(name, None)
        if value is not None:
            start = computer.merged(value, start if name in value.names else None)
        made[name] = start
        del start
    for key, tensor in plan.names.backward(group, made).items():
        if key in writer.offsets:
            writer.write(key, tensor)
            advance(tensor.numel() * tensor.element_size())


def _finish(base: Path, plan: Plan, others: list[Path], journal: Journal) -> None:
    """The other files; then the folder gets its name."""
    stage = journal.stage
    for file in others:
        shutil.copyfile(file, stage / file.name)
    stated = skeleton.read_config(base)
    new = settings(plan, stated)
    if new != stated:
        _write_json(stage / CONFIG, new)
    if plan.shards.index is not None:
        index = dict(plan.shards.index)
        held = {p.key: f.name for f in plan.files for p in f.places}
        known = {k: n for k, n in index["weight_map"].items() if held.get(k) == n}
        index["weight_map"] = {**known, **held}
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": sum(f.size for f in plan.files)}
        index["metadata"].pop("total_parameters", None)
        _write_json(stage / INDEX, index)
    for file in stage.iterdir():
        if file.name not in journal.done:
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
    journal.publish()


def _write_json(file: Path, table: dict[str, Any]) -> None:
    file.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def progress(total: int, show: bool) -> Iterator[Any]:
    """Something to call with the bytes that are done; a bar if `show` and tqdm is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        show = False
    if not show:
        yield lambda size: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, desc="Merging") as bar:
        yield bar.update
