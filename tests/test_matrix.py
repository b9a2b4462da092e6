"""The capability matrix: every cell of every method is yes, or something forbids it."""

from __future__ import annotations

import pytest

import peft
from conformance.oracles import METHODS
from matrix.abilities import ABILITIES
from matrix.layouts import LAYOUTS
from matrix.measure import answer
from matrix.reasons import GAPS, REASONS, reason
from matrix.rows import ROWS
from matrix.storages import STORAGES

for package in ("transformers", "bitsandbytes", "torchao", "hqq"):
    pytest.importorskip(package)

HERE = [name for name, row in ROWS.items() if hasattr(peft, row.config)]
COLUMNS = {**LAYOUTS, **STORAGES, **ABILITIES}
OF_LAYERS = {row.config.__name__ for row in METHODS.values()}


def columns(name):
    """All, but that `conformance/test_compile` and `test_compile_export` have compiled all methods of plain layers."""
    row = ROWS[name]
    again = row.config in OF_LAYERS and row.base == "layers" and not row.prepare and name != "lora"
    return {column: cell for column, cell in COLUMNS.items() if not (again and column == "compile fullgraph")}


@pytest.mark.parametrize("name", HERE)
def test_every_cell_is_yes_or_something_forbids_it(name):
    found = {column: answer(cell, ROWS[name]) for column, cell in columns(name).items()}
    wrong = {c: a for c, a in found.items() if a[0].startswith("no") and reason(name, c, REASONS + GAPS) is None}
    assert not wrong
    assert any(a.startswith("yes") for a, _ in found.values())


def test_what_is_left_out_is_a_column():
    assert "compile fullgraph" in columns("lora") and len(columns("ia3")) == len(COLUMNS) - 1


def test_every_reason_is_about_some_cell():
    for lines in (REASONS, GAPS):
        used = {reason(row, column, lines) for row in ROWS for column in COLUMNS}
        assert {text for _, _, text in lines} <= used
