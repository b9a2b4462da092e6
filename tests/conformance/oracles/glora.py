"""GLoRA, with each form of its five tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft import GloraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, adding, held, matrix


def part(t: dict[str, Tensor], letter: str) -> Any:
    """A to E, as numbers that broadcast."""
    found = {key.rpartition(".")[2]: value for key, value in t.items() if key.startswith(f"glora_{letter}.")}
    return found["Xd"] @ found["Xu"] if "Xd" in found else found.get("X", 0 * next(iter(found.values())))


@adding
def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    return W * part(t, "A") + part(t, "B")


def bias(layer: BaseTunerLayer, name: str, b: Tensor | None) -> Tensor | None:
    if b is None:
        return None
    base: Any = layer.get_base_layer()
    prefix = "in_proj_" if hasattr(base, "in_proj_bias") else ""
    b0 = getattr(base, prefix + "bias").double()
    W0 = (getattr(base, prefix + "weight") if layer.packed is None else layer.packed.read(base, "weight")).double()
    t = held(layer, name)
    return b + b0 * part(t, "D") + part(t, "E") + (matrix(layer, W0) @ part(t, "C")).squeeze(-1)


def row(ab: str, c: str, de: str, few: bool = False) -> Row:
    fields = {"r": 3, "config_A_B": ab, "config_C": c, "config_D_E": de}
    return Row(GloraConfig, fields, weight, bias, prefix="glora_", few=few)


ROWS = {
    "glora": row("lora", "lora", "constant", few=True),
    "glora-vectors": row("vector", "vector", "vector"),
    "glora-constant": row("constant", "none", "none"),
}
