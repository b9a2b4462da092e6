"""The capability matrix: every cell of every method is yes, or something forbids it."""

from __future__ import annotations

import pytest

import peft
from matrix.abilities import ABILITIES
from matrix.layouts import LAYOUTS
from matrix.measure import answer
from matrix.reasons import GAPS, REASONS, reason
from matrix.rows import ROWS
from matrix.storages import STORAGES

for package in ("transformers", "bitsandbytes", "torchao", "hqq"):
    pytest.importorskip(package)

HERE = [name for name, row in ROWS.items() if hasattr(peft, row.config)]


@pytest.mark.parametrize("name", HERE)
def test_every_cell_is_yes_or_something_forbids_it(name):
    found = {column: answer(cell, ROWS[name]) for column, cell in {**LAYOUTS, **STORAGES, **ABILITIES}.items()}
    wrong = {c: a for c, a in found.items() if a[0].startswith("no") and reason(name, c, REASONS + GAPS) is None}
    assert not wrong
    assert any(a.startswith("yes") for a, _ in found.values())


def test_every_reason_is_about_some_cell():
    columns = [*LAYOUTS, *STORAGES, *ABILITIES]
    for lines in (REASONS, GAPS):
        used = {reason(row, column, lines) for row in ROWS for column in columns}
        assert {text for _, _, text in lines} <= used
