"""The columns for layouts: wrapping works, the randomised adapter has an effect, and its tensors get a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from . import bases
from .probe import NotAsked, Probe, close, fields, need
from .rows import Row

Cell = Callable[[Row, Path], str]


def works(probe: Probe, **more: object) -> str:
    base, inputs = probe.base()
    with torch.no_grad():
        before = probe.run(base, inputs).clone()
    model, inputs = probe.wrapped(**more)
    out = probe.run(model, inputs)
    need(bool(torch.isfinite(out).all()), "not finite")
    need(not close(out, before, 1e-6), "no effect")
    out.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    need(bool(gradients) and all(bool(torch.isfinite(g).all()) for g in gradients), "no gradient")
    need(any(float(g.abs().max()) > 0 for g in gradients), "no gradient")
    return "yes"


def of_layout(build: Callable, targets: list[str], normalisation: bool = False) -> Cell:
    def cell(row: Row, folder: Path) -> str:
        if row.base.startswith("llama") or (row.base == "norms") != normalisation:
            raise NotAsked
        return works(Probe(row, build, targets, folder))

    return cell


def of_parameters(build: Callable, names: list[str]) -> Cell:
    def cell(row: Row, folder: Path) -> str:
        if row.base.startswith("llama") or row.base == "norms":
            raise NotAsked
        need("target_parameters" in fields(row), "no such option")
        return works(Probe(row, build, [], folder), target_parameters=names)

    return cell


LAYOUTS: dict[str, Cell] = {
    **{name: of_layout(build, ["target"]) for name, build in bases.LAYOUTS.items()},
    **{name: of_layout(build, ["norm"], True) for name, build in bases.NORMS.items()},
    **{name: of_parameters(build, names) for name, (build, names) in bases.PARAMETERS.items()},
}
