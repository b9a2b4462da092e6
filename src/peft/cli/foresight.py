"""`peft plan` and `peft estimate`: what an adapter would change, and the memory it would take, without any weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from peft.cli import report
from peft.cli.check import UsageError
from peft.cli.options import EstimateOptions, ForesightOptions, PlanOptions
from peft.cli.plan import kinds_of
from peft.errors import PeftError, nearest
from peft.types import plain

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def plan(options: PlanOptions) -> int:
    """Print what an adapter would change, a line for each kind of target. Returns 0."""
    import peft

    config = _config(options)
    try:
        found = peft.plan(options.model, config, strict=True)
    except (PeftError, ValueError) as problem:
        raise UsageError(f"{options.model}: {problem}") from problem
    if options.json:
        rows, skipped = [asdict(row) for row in found.rows], [{"path": p, "reason": why} for p, why in found.skipped]
        counts = {"trainable": found.trainable, "base_parameters": found.base_parameters}
        report.as_json({**counts, "targets": rows, "skipped": skipped, "notes": found.notes})
        return 0
    head = ["target", "n", "weight", "rank", "scale", "trainable"]
    report.table(f"{plain(config.peft_type)} on {options.model}", head, list(_lines(found.rows)))
    for path, why in found.skipped:
        report.say(f"Skipped: {path or '(the model)'}: {why}.")
    report.say(found.summary)
    for note in found.notes:
        report.say(f"Note: {note}")
    return 0


def estimate(options: EstimateOptions) -> int:
    """Print the memory of a training step, or of a forward. Returns 0."""
    import peft

    config = _config(options)
    try:
        found = peft.estimate(
            options.model,
            config,
            options.batch,
            options.seq,
            options.optimizer,
            dtype=_dtype(options.dtype),
            quantization_config=_packing(options),
            gradient_checkpointing=options.gradient_checkpointing,
            training=not options.inference,
        )
    except (PeftError, ValueError) as problem:
        raise UsageError(f"{options.model}: {problem}") from problem
    if options.json:
        report.as_json(found.to_dict())
        return 0
    what = "A forward" if options.inference else f"A training step with {options.optimizer}"
    report.say(f"{what}, {options.batch} x {options.seq} tokens, {plain(config.peft_type)} on {options.model}:")
    report.say(str(found))
    return 0


def _lines(rows: Sequence[Any]) -> Iterator[list[str]]:
    for (kind, shape), alike in kinds_of(rows).items():
        counts = [row.trainable for row in alike]
        total = "" if None in counts else f"{sum(counts):,}"
        ranks, scales = (_range([getattr(row, name) for row in alike]) for name in ("rank", "scaling"))
        yield [f"{kind}\n  {alike[0].reason}", str(len(alike)), shape.replace(" ", ""), ranks, scales, total]


def _range(values: Sequence[float | None]) -> str:
    """The numbers of several layers: one, or from the least to the largest."""
    known = sorted({v for v in values if v is not None})
    return " to ".join(f"{v:.4g}" for v in (known[:1] + known[1:][-1:]))


def _config(options: ForesightOptions) -> Any:
    """The configuration that the options describe."""
    from peft import PeftConfig
    from peft.registry import config_class

    if options.adapter is not None:
        try:
            return PeftConfig.from_pretrained(options.adapter)
        except (PeftError, OSError, ValueError, TypeError) as problem:
            raise UsageError(f"--adapter {options.adapter}: {problem}") from problem
    try:
        kind = config_class((options.method or "lora").upper())
    except ValueError as problem:
        raise UsageError(f"--method {options.method}: {problem}") from problem
    values = _settings(options, [f.name for f in fields(kind)])
    try:
        return kind(**values)
    except (PeftError, ValueError, TypeError) as problem:
        raise UsageError(f"--method {options.method or 'lora'}: {problem}") from problem


def _settings(options: ForesightOptions, known: Sequence[str]) -> dict[str, Any]:
    """What `--target` and `--set` say, each value as JSON or else as text."""
    found: dict[str, Any] = {}
    if options.target is not None:
        names = [name.strip() for name in options.target.split(",")]
        found["target_modules"] = "all-linear" if names == ["all-linear"] else names
    for text in options.setting or ():
        name, _, value = text.partition("=")
        if name not in known:
            raise UsageError(
                f"--set {text}: {name!r} is no setting of {options.method or 'lora'}.{nearest(name, known)}"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, DTYPES[name]) if name in DTYPES else None


def _packing(options: EstimateOptions) -> Any:
    """The quantization_config of `--quantize`."""
    if options.quantize is None:
        return None
    import torch

    from peft.cli.quantize import KINDS

    make = KINDS[options.quantize].config
    assert make is not None, "checked before"
    return make(_dtype(options.dtype) or torch.bfloat16)
