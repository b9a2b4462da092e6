"""Updates that count more or less for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..core.scale import ScaledLayer
from ..errors import PeftWarning


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """Inside the block every update with a scaling counts `multiplier` times; the old scales come back.

    Blocks may be nested: their multipliers multiply. A scale that is set inside the block by other means stays, as that
    of an adapter whose weights are exchanged there. What is merged is not rescaled, with a warning.

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
    before = [(layer.scaling, name, scale) for layer in layers for name, scale in layer.scaling.items()]
    inside = [scale * multiplier for _, _, scale in before]
    try:
        for (scaling, name, _), scale in zip(before, inside, strict=True):
            scaling[name] = scale
        yield
    finally:
        for (scaling, name, scale), mine in zip(before, inside, strict=True):
            if scaling.get(name) is mine:
                scaling[name] = scale
