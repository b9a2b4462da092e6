"""The output folder of a run: its log, its resumable state, and whether a run fits what is there.

training_log.json says what was asked, what happened and whether the run is complete; training_state.pt exists
while a run is unfinished and holds all that is needed to go on (adapter, optimizer, step). Both are written
to a temporary file and then moved, so that a crash leaves the old one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft.cli.check import UsageError
from peft.cli.options import TrainOptions

LOG, STATE, CURVE = "training_log.json", "training_state.pt", "loss_curve.png"
FREE = ("output", "resume", "overwrite", "dry_run", "eval_data")  # may differ when a run goes on


@dataclass
class Log:
    """What a run was asked and what happened; `steps` has step, loss, learning_rate, tokens and seconds."""

    options: dict[str, Any]
    status: str = "running"
    examples: int = 0
    trainable_parameters: int = 0
    all_parameters: int = 0
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    peak_memory_gib: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [s["loss"] for s in self.steps]

    @property
    def seconds(self) -> float:
        """Time spent in training steps."""
        return sum(s["seconds"] for s in self.steps)

    def save(self, folder: Path) -> None:
        """Write training_log.json."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        replace(folder / LOG, lambda path: path.write_text(text, encoding="utf-8"))


def read_log(folder: Path) -> Log | None:
    """The log in `folder`, or None; raises UsageError if it cannot be read."""
    path = folder / LOG
    if not path.is_file():
        return None
    try:
        return Log(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as problem:
        raise UsageError(f"{path}: is damaged ({problem}). Use --overwrite or another --output.") from None


def kept_template(folder: Path) -> str | None:
    """The prompt template that the adapter in `folder` was trained with."""
    try:
        log = read_log(folder)
    except UsageError:
        raise UsageError(f"{folder / LOG}: cannot be read. Give the prompt's form with --template.") from None
    return log.options.get("template") if log else None


def kept_quantize(folder: Path) -> str | None:
    """How the base's weights were quantised while the adapter in `folder` was trained; None: not, or not known."""
    try:
        log = read_log(folder)
    except UsageError:
        return None
    return log.options.get("quantize") if log else None


def earlier_run(options: TrainOptions) -> Log | None:
    """The run to go on with (or already complete) in the output folder, None for a new one.

    Raises UsageError if the folder holds something else, or a run with other settings.
    """
    if options.overwrite:
        return None
    log = read_log(options.output)
    if log is None:
        _check_nothing(options)
        return None
    changed = _changes(log.options, described(options))
    if changed:
        raise UsageError(
            f"--output {options.output}: holds a run with other settings ({'; '.join(changed)}). "
            "Give the same settings to go on, --overwrite to start again, or another --output."
        )
    if log.status != "complete" and not (options.output / STATE).is_file():
        _check_nothing(options)
        return None
    return log


def _check_nothing(options: TrainOptions) -> None:
    if options.resume:
        raise UsageError(f"--resume: {options.output} holds no saved state. Leave --resume out to start a run.")
    foreign = options.output.is_dir() and any(p.name != LOG for p in options.output.iterdir())
    if foreign:
        raise UsageError(f"--output {options.output}: is not empty. Give another folder, or --overwrite.")


def described(options: TrainOptions) -> dict[str, Any]:
    """The options as they stand in the log; folders and files as absolute paths."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items() if k not in FREE}
    for name in ("model", "data"):
        path = Path(values[name])
        values[name] = str(path.resolve()) if path.exists() else values[name]
    return values


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"--{k.replace('_', '-')} was {old.get(k)}, now {new[k]}" for k in new if old.get(k) != new[k]]


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path in the same folder and move the result to `path` in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
