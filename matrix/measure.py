"""Run the experiments: each cell in a folder of its own, under a time limit, with warnings and output held back."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT = 60  # seconds for a cell


class OutOfTime(Exception):
    pass


def measure(rows: list[str] | None = None, columns: list[str] | None = None, verbose: bool = False) -> dict[str, Any]:
    """{"versions": ..., "layouts": names, "abilities": names, "cells": {method: {column: answer}}}."""
    import torch

    import peft

    from .abilities import ABILITIES
    from .layouts import LAYOUTS
    from .rows import ROWS
    from .storages import STORAGES

    torch.set_num_threads(1)
    cells: dict[str, dict[str, str]] = {}
    for name, row in ROWS.items():
        if rows and name not in rows:
            continue
        line = cells[name] = {}
        for column, cell in {**LAYOUTS, **STORAGES, **ABILITIES}.items():
            if columns and not any(word in column for word in columns):
                continue
            start = time.perf_counter()
            line[column], detail = answer(cell, row)
            if verbose:
                seconds = time.perf_counter() - start
                print(f"{name:24} {column:28} {line[column]:32} {seconds:5.1f} s {detail}", flush=True)
        if not verbose:
            print(f"{name:24} {sum(a.startswith('yes') for a in line.values()):3} yes", file=sys.stderr, flush=True)
    versions = {"peft": peft.__version__, "torch": torch.__version__}
    groups = {"layouts": list(LAYOUTS), "storages": list(STORAGES), "abilities": list(ABILITIES)}
    return {"versions": versions, **groups, "cells": cells}


def answer(cell: Any, row: Any) -> tuple[str, str]:
    """The cell's answer, and the message of what went wrong."""
    from .probe import NotAsked, Wrong

    with tempfile.TemporaryDirectory() as folder, quiet(folder), limited():
        try:
            return cell(row, Path(folder)), ""
        except NotAsked:
            return "n.a.", ""
        except Wrong as problem:
            return f"no ({problem})", ""
        except Exception as problem:
            return f"no ({type(problem).__name__})", " ".join(str(problem).split())[:200]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def quiet(folder: str) -> Iterator[None]:
    import logging

    here = os.getcwd()
    os.chdir(folder)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        os.chdir(here)
        logging.disable(logging.NOTSET)
