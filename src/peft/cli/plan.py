"""Which layers a run would adapt, from the model's configuration alone; `peft train --dry-run`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from peft.cli import report
from peft.cli.check import UsageError
from peft.cli.data import find_columns, read_rows
from peft.cli.model import base_name, meta_model, method_config
from peft.cli.options import TrainOptions
from peft.errors import PeftError


def checked_plan(model: nn.Module, config: Any) -> Any:
    """`peft.plan(model, config)`; a name that matches nothing is a UsageError, not a warning."""
    import peft

    try:
        return peft.plan(model, config, strict=True)
    except (PeftError, ValueError) as problem:
        raise UsageError(f"--target: {problem}") from problem


def show_plan(options: TrainOptions) -> int:
    """`--dry-run`: print one line for each kind of target and the trainable parameters, without weights."""
    from peft import get_peft_model

    first = next(read_rows(options.data), None)
    if first is None:
        raise UsageError(f"--data {options.data}: no rows found.")
    columns = find_columns(list(first), options, options.data)
    model, config = meta_model(base_name(options.model)), method_config(options)
    kinds = kinds_of(checked_plan(model, config).rows)
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    rows = [
        [kind, str(len(alike)), shape, f"{sum(_trainable(adapted, row.path) for row in alike):,}"]
        for (kind, shape), alike in kinds.items()
    ]
    report.table(f"{options.method} on {options.model}", ["target", "layers", "weight", "trainable"], rows)
    trainable, total = adapted.get_nb_trainable_parameters()
    report.say(f"{trainable:,} of {total:,} parameters trainable ({100 * trainable / total:.4f} %)")
    used = ", ".join(f"{kind} = {name}" for kind, name in vars(columns).items() if name)
    report.say(f"columns: {used}. Nothing was loaded or written.")
    return 0


def kinds_of(rows: Sequence[Any]) -> dict[tuple[str, str], list[Any]]:
    """{(path, shape): a plan's rows}; those alike but for layer numbers are together."""
    kinds: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        kind = re.sub(r"\.\d+\.", ".*.", row.path), " x ".join(map(str, row.shape))
        kinds.setdefault(kind, []).append(row)
    return kinds


def _trainable(adapted: Any, path: str) -> int:
    module = adapted.get_base_model().get_submodule(path)
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
