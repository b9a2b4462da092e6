"""A merge of one adapter into an ordinary linear layer, with little to do beside the sums.

It does what `Mergeable._merge` does, and leaves to it whatever is not quite ordinary: layers that are hooked, disabled,
tied, spread, quantised, offloaded or merged already, several active adapters, biases, numbers that are not finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import storage
from .blocks import TILE_BYTES, filled
from .folding import Fold
from .lent import own
from .recycled import empty_like
from .sharded.gather import is_spread
from .views import LinearView

STEPS = ("_merge_here", "_write", "_payload", "check_merge", "tiles")
OWN = frozenset(f"{__package__}.{room}" for room in ("blocks", "merge", "sharded.together"))  # where those are stated

_ordinary: dict[type, bool] = {}  # classes of layers


def merged(layer: Any, name: str) -> bool:
    """Merge adapter `name`, and say so; False where nothing was done, and `_merge` must.

    Arguments:
        layer: a tuner layer.
        name: one of its adapters.
    """
    found = ordinary(layer, name)
    if found is None:
        return False
    weight, fold = found
    old: Tensor = weight.data
    place = empty_like(old, TILE_BYTES)
    with torch.no_grad():
        if not filled(fold, old, place):
            return False
    weight.data = place
    layer.__dict__.update(_saved={"weight": (storage.DENSE, old)}, _merged=[name])
    layer._replan()
    return True


def ordinary(layer: Any, name: str) -> tuple[nn.Parameter, Fold] | None:
    """The weight and the adapter's fold, where nothing about the layer is out of the ordinary."""
    kind = type(layer)
    if kind not in _ordinary:
        _ordinary[kind] = {getattr(kind, step).__module__ for step in STEPS} <= OWN
    base, d = layer._modules["base_layer"], layer.__dict__
    if not _ordinary[kind] or type(base) is not nn.Linear or type(layer.view) is not LinearView or "_hf_hook" in d:
        return None
    if layer._disabled or layer._merged or layer._saved is not None or layer.tied is not None:
        return None
    if any(n != name and n in layer.adapters for n in layer._active) or "_hf_hook" in base.__dict__:
        return None
    p, weight, b = layer.adapters[name], base._parameters.get("weight"), layer.view.bias(base)
    if b is not None or p.shared or p.method.bias(p, None) is not None or weight is None or not own(base, "weight"):
        return None
    if (
        weight.dim() != 2
        or weight.is_inference()
        or is_spread(weight)
        or any(is_spread(q) or q.is_meta for q in layer.adapter_parameters(name))
    ):
        return None
    p.method.refuse_merge(p)
    fold = p.method.fold(p, torch.promote_types(weight.dtype, torch.float32), True)
    return None if fold is None else (weight, fold)
