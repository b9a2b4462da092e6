"""BEFT."""

from __future__ import annotations

from torch import Tensor

from peft import BeftConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .row import Row, held


def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    return W


def bias(layer: BaseTunerLayer, name: str, b: Tensor | None) -> Tensor:
    beta = held(layer, name)["beft_bias"][0]
    return beta if b is None else b + beta


def forbidden(layout: Layout) -> str | None:
    return "has no bias" if layout.kind == "parameter" or "separate" in layout.name else None


ROWS = {"beft": Row(BeftConfig, {}, weight, bias, forbidden=forbidden, prefix="beft_")}
