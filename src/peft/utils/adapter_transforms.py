"""What transformers' loader does to the tensors of an adapter's file: steps of its own kinds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from ..core.experts import holds_both, side_by_side

_EXPERT = re.compile(r"(?P<experts>.*experts)\.\*\.(?P<name>\w+)\.weight")
_STACK = re.compile(r"(?P<experts>.*experts)\.(?P<name>gate_up_proj|down_proj)")


class AdapterRenaming(WeightRenaming):
    """A renaming that the model does not remember: once the adapter is gone, its base is saved under its own names."""

    def was_used(self) -> bool:
        return False


class AdapterConverter(WeightConverter):
    """Makes one factor of a stack of experts, and finds out late, when the adapter is in place, where that lies.

    Arguments:
        source_patterns: of the factors of each expert's projections.
        target_pattern: of the stack's factor; `<place>` stands for the layer below, if there is one.
        side: "A" or "B".
        is_below: tells whether another adapted stack lies above this one.
    """

    def __init__(self, source_patterns: list[str], target_pattern: str, side: str, is_below: Callable[[], bool]):
        super().__init__(source_patterns, target_pattern, [SideBySide(side)])
        self.is_below = is_below

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed, pattern = super().rename_source_key(source_key)
        return renamed.replace("<place>", ".base_layer" if pattern and self.is_below() else ""), pattern

    def was_used(self) -> bool:
        return False


class SideBySide(ConversionOps):
    """Lays the factors of a stack's experts side by side.

    Arguments:
        side: "A" or "B".
    """

    def __init__(self, side: str):
        self.side = side

    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], **given: Any
    ) -> dict[str, Tensor]:
        halves = [input_dict[pattern] for pattern in source_patterns]
        return {given["full_layer_name"]: side_by_side([list(row) for row in zip(*halves, strict=True)], self.side)}


def of_experts(conversions: list[Any], prefix: str, adapter_name: str, config: Any) -> list[AdapterConverter]:
    """The steps for an adapter's factors that go with those of the model for its experts.

    Arguments:
        conversions: the model's own.
        prefix: what the names of the method's tensors start with.
        adapter_name: the adapter the tensors are for.
        config: its configuration, which is rewritten for the stacks when the adapter is put in place.
    """
    found = [(c, *named) for c in conversions if (named := _names(c)) is not None]
    down = next((names[0] for _, _, names, stack in found if stack == "down_proj"), "")
    steps = []
    for conversion, experts, names, stack in found:
        is_below = _never if stack == "down_proj" else lambda: holds_both(config, down)
        for side in "AB":
            end = f"{prefix}{side}.{adapter_name}.weight"
            sources = [f"{experts}.*.{name}.{end}" for name in names]
            step = AdapterConverter(sources, f"{experts}<place>.{end}", side, is_below)
            step.scope_prefix, step.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
            steps.append(step)
    return steps


def _never() -> bool:
    return False


def _names(conversion: Any) -> tuple[str, list[str], str] | None:
    """(path of the experts, old names of projections, the stack that holds them) of a step that stacks experts."""
    if not isinstance(conversion, WeightConverter):
        return None
    kinds = {type(step).__name__ for step in conversion.operations}
    stack = _STACK.fullmatch(conversion.target_patterns[0])
    parts = [_EXPERT.fullmatch(pattern) for pattern in conversion.source_patterns]
    if stack is None or None in parts or not kinds <= {"MergeModulelist", "Concatenate"}:
        return None
    return stack["experts"], [part["name"] for part in parts if part], stack["name"]
