"""`peft inspect` and `peft check`: what an adapter holds, and whether it fits a base model."""

from __future__ import annotations

from collections.abc import Sequence

from peft.cli import report
from peft.cli.options import CheckOptions, InspectOptions

SHOWN = 40  # rows; --json has all


def run(options: InspectOptions) -> int:
    """Print what is known of an adapter. Returns 0, or 1 if something serious is wrong."""
    from peft.inspection import inspect_adapter

    found = inspect_adapter(options.adapter)
    if options.json:
        report.as_json(found.to_dict())
        return 0 if found.ok else 1
    kinds = ", ".join(f"{n} x {dtype}" for dtype, n in found.dtypes.items())
    report.say(f"{found.path}: {found.method}, {found.parameters:,} parameters, {found.bytes:,} bytes ({kinds})")
    base = found.base_model or "not named"
    report.say(f"Base model: {base}; fingerprint {found.fingerprint or 'not saved'}")
    shown = {k: v for k, v in found.config.items() if k not in ("peft_type", "base_model_name_or_path")}
    report.say("Configuration: " + ", ".join(f"{k}={v!r}" for k, v in shown.items()))
    rows = [
        [t.path or "(the model)", _number(t.rank), _number(t.scaling), _number(t.product_norm), f"{t.parameters:,}"]
        for t in found.targets
    ]
    _table("Targets", ["module", "rank", "scaling", "norm of s B A", "parameters"], rows)
    tensors = [
        [t.key.removeprefix("base_model.model."), " x ".join(map(str, t.shape)), t.dtype, _number(t.norm)]
        for t in found.tensors
    ]
    _table("Tensors", ["key", "shape", "dtype", "norm"], tensors)
    for problem in found.problems:
        report.say(f"{'Problem' if problem.serious else 'Note'} ({problem.kind}): {problem.text}.")
    if not found.problems:
        report.say("No problems found.")
    return 0 if found.ok else 1


def check(options: CheckOptions) -> int:
    """Hold an adapter against a base model. Returns 0 if all of it fits, else 1."""
    from peft.inspection import check_adapter

    fit = check_adapter(options.adapter, options.base)
    if options.json:
        report.as_json(fit.to_dict())
        return 0 if fit.ok else 1
    report.say(f"{fit.adapter} on {fit.model}: {fit.matched} tensors fit.")
    if fit.refused:
        report.say(f"The configuration does not fit: {fit.refused}")
    _table("Missing: places that the file has no tensor for", ["key"], [[k] for k in fit.missing])
    _table("Unexpected: tensors without a place", ["key", "nearest"], [[k, n] for k, n in fit.unexpected.items()])
    _table(
        "Of another shape",
        ["key", "file", "model"],
        [[k, *(" x ".join(map(str, s)) for s in shapes)] for k, shapes in fit.misshapen.items()],
    )
    _table("The base differs from the one that it was saved from", ["parameters"], [[line] for line in fit.base])
    for note in fit.notes:
        report.say(f"Note: {note}")
    report.say("The adapter fits." if fit.ok else "The adapter does not fit.")
    return 0 if fit.ok else 1


def _table(title: str, head: Sequence[str], rows: list[list[str]]) -> None:
    """A table with its first rows, or nothing where there are none."""
    if rows:
        cut = f" (the first {SHOWN} of {len(rows)}; --json has all)" if len(rows) > SHOWN else ""
        report.table(title + cut, head, rows[:SHOWN])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"
