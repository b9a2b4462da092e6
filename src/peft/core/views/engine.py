"""Transformer Engine's `Linear`, and Megatron's layers over it: no class of torch's, and some return pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear import Layer, LinearView, Pair

_HERE = "transformer_engine.pytorch"
_FUSED = ("LayerNormLinear", "LayerNormMLP", "GroupedLinear")
_MEGATRON = ".extensions.transformer_engine"  # in megatron.core, or in a copy of it by another name


class EngineView(LinearView):
    """`Linear`, found by the name of its class; its weight may be a tensor in FP8.

    Without a bias its `bias` is an empty tensor. With `return_bias`, and always below Megatron's classes, a call gives
    (W x, b), or (W x + b, None): an adapter's W' x + b' goes into the first, and the second becomes zeros. The weight
    has to lie whole on each process. Source: the documentation of `transformer_engine.pytorch.Linear`.
    """

    def shape(self, m: Layer) -> Pair:
        if getattr(m, "tp_size", 1) != 1:
            raise ValueError(
                f"This {type(m).__name__} holds 1/{m.tp_size} of its weight. Adapters need all of it on each process: "
                "run with a tensor-parallel size of 1."
            )
        return (m.out_features, m.in_features)

    def bias(self, m: Layer) -> Tensor | None:
        b = super().bias(m)
        return None if b is None or not getattr(m, "use_bias", True) else b

    def output(self, given: Any) -> Tensor:
        y: Tensor = given[0] if isinstance(given, tuple) else given
        apart = given[1] if isinstance(given, tuple) else None
        return y if apart is None or apart.numel() == 0 else y + apart

    def finishes(self, m: Layer) -> bool:
        return _apart(m) or any(c.__module__.endswith(_MEGATRON) for c in type(m).__mro__)

    def finish(self, m: Layer, y: Tensor) -> Any:
        return y, torch.zeros_like(m.bias) if _apart(m) and self.bias(m) is not None else None


def _apart(m: Layer) -> bool:
    return bool(getattr(m, "return_bias", False) or getattr(m, "te_return_bias", False))


def is_engine(kind: type) -> bool:
    """Whether a class is Transformer Engine's linear layer."""
    return any(c.__qualname__ == "Linear" and c.__module__.startswith(_HERE) for c in kind.__mro__)


def is_fused(kind: type) -> bool:
    """Whether a class is one of Transformer Engine's that do more than W x + b, out of an adapter's reach."""
    return any(c.__qualname__ in _FUSED and c.__module__.startswith(_HERE) for c in kind.__mro__)
