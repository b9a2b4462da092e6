"""Adapter files: what is saved comes back the same, for every method on every layout.

`make parity` exchanges the same adapters with the other library; its answers are in docs/interchange.md.
"""

from __future__ import annotations

import pytest

import peft

pytest.importorskip("transformers")

from matrix.rows import ROWS
from parity import cases as of_parity
from parity import exchange
from parity.reasons import REASONS, reason
from parity.report import judge, write

METHODS = sorted({case.method for case in of_parity.cases()})


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_an_adapter_computes_the_same_and_is_saved_the_same_again(method, tmp_path, monkeypatch):
    mine = [case for case in of_parity.cases() if case.method == method]
    monkeypatch.setattr(exchange, "cases", lambda: iter(mine))
    saved = exchange.save(tmp_path)
    loaded = exchange.load(tmp_path)
    assert loaded.keys() == {name for name, problem in saved.items() if not problem}
    assert any(not problem for problem in saved.values())
    wrong = {case.name: found for case in mine if (found := loaded.get(case.name)) and judge(case, found, False)[1]}
    assert not wrong


def test_every_reason_is_about_some_case():
    texts = {reason(case.method, case.where) for case in of_parity.cases()}
    here = [text for rows, _, text in REASONS if any(hasattr(peft, ROWS[r].config) for r in ROWS if r in rows)]
    assert set(here) <= texts


def test_what_nothing_explains_fails_and_is_named(tmp_path, capsys):
    case = next(c for c in of_parity.cases() if c.method == "lora" and c.where == "Linear")
    same = {"difference": 0.0, "tensors": [], "fields": []}
    found = {"here": {case.name: ""}, "there": {case.name: ""}, "own": {case.name: same}, "from": {case.name: same}}
    page = tmp_path / "page.md"
    assert write({**found, "to": {case.name: same}}, page) == 0
    assert write({**found, "to": {case.name: {**same, "difference": 0.1}}}, page) == 1
    assert f"to: {case.name}: outputs differ by 1.0e-01" in capsys.readouterr().out
    assert write({**found, "to": {case.name: {**same, "fields": ["r"]}}}, page) == 1
    assert write({**found, "to": {case.name: "ValueError: no"}}, page) == 1
