"""The methods under test: every module here states the rows of one method in `ROWS`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .row import Row

METHODS: dict[str, Row] = {}
for _found in sorted(m.name for m in iter_modules(__path__) if m.name != "row"):
    METHODS.update(import_module(f"{__name__}.{_found}").ROWS)
