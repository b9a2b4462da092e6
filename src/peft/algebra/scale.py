"""Updates that count more or less for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.contexts import Open, Opened
from ..core.scale import ScaledLayer
from ..errors import PeftWarning


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """Inside the block every update with a scaling counts `multiplier` times; the old scales come back.

    Blocks may be nested: their multipliers multiply, and each is taken out when its block is left, in any order. A
    scale that is set inside the block by other means stays, as that of an adapter whose weights are exchanged there.
    What is merged is not rescaled, with a warning.

    Arguments:
        model: a model with layers of LoRA, or of another method with a scaling (AdaLoRA, LoHa, LoKr ...).
        multiplier: a number.

    Raises TypeError if it is no number, ValueError if there is no such layer.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [m for m in model.modules() if isinstance(m, ScaledLayer)]
    if not layers:
        raise ValueError(
            "scaling is only supported for models with `LoraLayer`s or others that have a scaling; this model has none."
        )
    if any(layer.merged for layer in layers):
        text = "Some adapters are merged: what they have added to the weights is not rescaled. Unmerge them first."
        warnings.warn(text, PeftWarning, stacklevel=3)
    found = {(layer, name): scale for layer in layers for name, scale in layer.scaling.items()}
    mine = _open.enter(ScaledLayer, found, (multiplier, {key: scale * multiplier for key, scale in found.items()}))
    try:
        for (layer, name), scale in mine.did[1].items():
            layer.scaling[name] = scale
        yield
    finally:
        _undo(mine, _open.leave(ScaledLayer, mine))


def _undo(mine: Opened[Any], later: list[Opened[Any]]) -> None:
    """Take a multiplier out again, of scales that nobody else has set since the last of the contexts was entered."""
    for key, scale in mine.found.items():
        others = [other for other in later if key in other.found]
        (layer, name), last = key, (others[-1] if others else mine).did[1][key]
        if layer.scaling.get(name) is not last:
            continue
        for other in others:  # as if it had found this
            other.found[key] = scale
            multiplier, made = other.did
            scale = made[key] = scale * multiplier
        layer.scaling[name] = scale


_open: Open[Any] = Open()
