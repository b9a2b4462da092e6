"""What is exchanged: every method of the matrix on every layout, and on a model with a trained head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
from matrix import bases
from matrix.probe import Probe, fields
from matrix.rows import ROWS, Row


@dataclass(frozen=True, eq=False)
class Case:
    """One adapter.

    Arguments:
        method: a row of the matrix.
        where: the base and the variant, for people.
        row: the method's configuration.
        build: makes the base model and its inputs.
        targets: `target_modules`; None leaves them to the library.
        more: further fields of the configuration.
    """

    method: str
    where: str
    row: Row
    build: Callable[[], tuple[Any, dict]]
    targets: list[str] | None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}--{self.where}".replace(":", "_").replace(" ", "_")

    def probe(self, folder: Path) -> Probe:
        return Probe(self.row, self.build, self.targets, folder)


def cases() -> Iterator[Case]:
    """The cases that the installed library has a configuration for."""
    for method, row in ROWS.items():
        if not hasattr(peft, row.config) or method == "lora:arrow":  # it is built of adapters, and saves none
            continue
        if row.base == "layers":
            yield from _on_layouts(method, row)
        build, targets = bases.ABILITIES[row.base]
        yield Case(method, "a model", row, build, targets)
        if row.pattern is not None:
            yield Case(method, "per module", row, build, targets, {"module_config": {"layers.0.fc": row.pattern}})
        if "modules_to_save" in fields(row):
            head = "lm_head" if row.base.startswith("llama") else "head"
            yield Case(method, "a trained head", row, build, targets, {"modules_to_save": [head]})


def _on_layouts(method: str, row: Row) -> Iterator[Case]:
    for where, build in bases.LAYOUTS.items():
        yield Case(method, where, row, build, ["target"])
    if "target_parameters" in fields(row):
        for where, (build, names) in bases.PARAMETERS.items():
            yield Case(method, where, row, build, [], {"target_parameters": names})
