"""LN tuning: every tensor of the module is the copy's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft import LNTuningConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .row import Row, held


def values(layer: BaseTunerLayer, name: str) -> dict[str, Tensor]:
    return {key.removeprefix("ln_tuning_layers."): value for key, value in held(layer, name).items()}


def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Any:
    raise AssertionError("the whole module is told by its values")


def parameters(layout: Layout) -> str | None:
    return "whole modules" if layout.kind == "parameter" else None


ROWS = {
    "ln-tuning": Row(
        LNTuningConfig,
        {},
        weight,
        values=values,
        forbidden=parameters,
        prefix="ln_tuning_",
        alone=True,
        own_dtype=True,
    )
}
