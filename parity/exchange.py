"""The two halves: save everything with the outputs beside it; load it elsewhere, compare, save again."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from matrix.measure import limited, quiet

from .cases import Case, cases

OUTPUT = "output.safetensors"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# what says who saved an adapter and of which model, and not what it computes
ORIGIN = {"peft_version", "base_model_name_or_path", "auto_mapping", "revision", "inference_mode"}


def save(folder: Path) -> dict[str, str]:
    """Save every case; {case: "" or what went wrong}."""
    return _each(lambda case: _save(case, folder / case.name))


def _save(case: Case, place: Path) -> str:
    place.mkdir(parents=True)
    model, inputs = case.probe(place).wrapped(**case.more)
    with torch.no_grad():
        output = case.probe(place).run(model, inputs)
    model.save_pretrained(str(place))
    save_file({"output": output.contiguous()}, str(place / OUTPUT))
    return ""


def load(folder: Path) -> dict[str, Any]:
    """Load what another library saved: {case: {"difference", "tensors", "fields"} or what went wrong}."""
    return _each(lambda case: _load(case, folder / case.name), lambda case: (folder / case.name / OUTPUT).exists())


def _load(case: Case, place: Path) -> dict[str, Any]:
    probe = case.probe(place)
    model = probe.loaded(str(place))
    with torch.no_grad():
        output = probe.run(model, probe.base()[1])
    want = load_file(str(place / OUTPUT))["output"]
    scale = max(1.0, float(want.abs().max()))
    difference = float((output - want).abs().max()) / scale if output.shape == want.shape else float("inf")
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        return {
            "difference": difference,
            "tensors": _unlike(load_file(str(place / WEIGHTS)), load_file(f"{again}/{WEIGHTS}"), _equal),
            "fields": _unlike(_fields(place), _fields(Path(again)), lambda a, b: a == b),
        }


def _each(act: Callable[[Case], Any], wanted: Callable[[Case], bool] = lambda case: True) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for case in filter(wanted, cases()):
        with tempfile.TemporaryDirectory() as folder, quiet(folder), limited():
            try:
                found[case.name] = act(case)
            except Exception as problem:
                found[case.name] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
        if len(found) % 100 == 0:
            print(f"{len(found)} cases", file=sys.stderr, flush=True)
    return found


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _fields(place: Path) -> dict[str, Any]:
    content = json.loads((place / CONFIG).read_text())
    return {k: _sorted(v) for k, v in content.items() if k not in ORIGIN}


def _sorted(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return sorted(value)  # sets are written as lists
    return {k: _sorted(v) for k, v in value.items()} if isinstance(value, dict) else value


def _unlike(old: dict, new: dict, same: Callable[[Any, Any], bool]) -> list[str]:
    """Names whose values differ, or that only one of the two has."""
    return sorted(n for n in old.keys() | new.keys() if n not in old or n not in new or not same(old[n], new[n]))
