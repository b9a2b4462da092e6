"""What a merge wrote into a base layer becomes part of it for good, so that its adapter may go."""

from __future__ import annotations

import torch

from .merge import Mergeable


@torch.no_grad()
def bake(layer: Mergeable, name: str) -> None:
    """Forget that adapter `name` is merged: the base weight stays as it is, bit for bit, and is the base from now on.

    Arguments:
        layer: a layer in which `name` is merged. While it is disabled its base holds nothing of the merge, so that
            nothing stays.
        name: the adapter.

    Raises ValueError where others are merged too and what they would leave behind cannot be told apart from this one:
    in quantised weights, and where methods do not commute.
    """
    if layer._suspended is not None:
        layer._suspended = [n for n in layer._suspended if n != name] or None
        return
    rest = [n for n in layer._merged if n != name]
    if not rest:
        layer.__dict__.update(_saved=None, _packed_base=None, tied=None)
    elif layer._rewrites() or not all(layer.adapters[n].method.additive for n in layer._merged):
        raise ValueError(
            f"Cannot delete the adapter {name!r} while it is merged together with {rest} at {layer._where()!r}: the "
            "weight cannot be told apart. Call unmerge first, or delete all of them by unloading."
        )
    else:
        merged, original = layer._payload(), layer._saved
        layer._restore()
        try:
            layer._write((name,))
            original = layer._payload()
        finally:
            layer.__dict__["_saved"] = merged
            layer._restore()
            layer.__dict__["_saved"] = original
    layer._merged = rest
