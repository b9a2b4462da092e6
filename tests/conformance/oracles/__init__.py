"""The methods under test: every module here states the rows of one method in `ROWS`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from peft import LoraConfig

from .row import Row, under_dora

METHODS: dict[str, Row] = {}
for _found in sorted(m.name for m in iter_modules(__path__) if m.name != "row"):
    METHODS.update(import_module(f"{__name__}.{_found}").ROWS)

# One row more for each additive method: the same under DoRA.
FIELDS = {n: row.config.__dataclass_fields__ for n, row in METHODS.items() if row.few and row.config is not LoraConfig}
OVER = [n for n in FIELDS if "use_dora" in FIELDS[n] and METHODS[n].fields.get("init_weights") != "bat"]
METHODS.update({f"{n}-dora": under_dora(METHODS[n]) for n in OVER})
