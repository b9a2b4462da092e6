"""A merge of one adapter into an ordinary linear layer, and the way back, with little to do beside the sums.

It does what `Mergeable` does, and leaves to it whatever is not quite ordinary: layers that are hooked, disabled,
tied, spread, quantised, offloaded or merged already, several active adapters, numbers that are not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import storage
from .blocks import PER_ELEMENT, bounded, filled, rows_of_a_tile
from .folding import Fold
from .kinds import stated_outside
from .lent import alike, own, put, same_memory
from .payload import finite
from .recycled import TILE_BYTES, empty_like
from .sharded.gather import is_spread
from .stack import Adapter
from .views import LinearView

STEPS = ("_merge_here", "_write", "_payload", "check_merge", "tiles")
OWN = frozenset(f"{__package__}.{room}" for room in ("blocks", "merge", "sharded.together"))  # where those are stated

_ordinary: dict[tuple[Any, ...], bool] = {}  # by class of layers, and what programs may have put there


class Saved(dict[str, Any]):
    """The payload of a layer that was merged here."""


class Change(NamedTuple):
    """What an adapter makes of an ordinary layer.

    Attributes:
        weight: the layer's, (O, I).
        p: the adapter.
        fold: makes W'; None where the method states its definition alone.
        bias: (b, b') where the layer has one; b' is b where nothing changes.
    """

    weight: nn.Parameter
    p: Adapter
    fold: Fold | None
    bias: tuple[Tensor, Tensor] | None

    @property
    def size(self) -> int:
        """Bytes of W."""
        return self.weight.numel() * self.weight.element_size()

    def bounded(self) -> bool:
        """Whether all is finite, told without making W'; False: that cannot tell."""
        return self.fold is not None and self._bias_holds() and bounded([self.fold], self.weight.data)

    def made(self) -> Tensor | None:
        """W' in memory of its own; None if W' or b' is not finite."""
        old = self.weight.data
        if not self._bias_holds():
            return None
        if self.fold is not None:
            place = empty_like(old, TILE_BYTES)
            return place if filled(self.fold, old, place) else None
        return self._defined(old)

    def _bias_holds(self) -> bool:
        return self.bias is None or self.bias[0] is self.bias[1] or finite(self.bias[1])

    def _defined(self, old: Tensor) -> Tensor | None:
        """W' as the method defines it, in blocks of rows."""
        (out, inp), method = old.shape, self.p.method
        step = rows_of_a_tile(inp * PER_ELEMENT, old.device) if method.rowwise(self.p) else out
        if step >= out:
            W = method.weight(self.p, old)
            if not finite(W):
                return None
            return W if alike(W, old) and not same_memory(W, old) else empty_like(old, TILE_BYTES).copy_(W)
        place = empty_like(old, TILE_BYTES)
        for start in range(0, out, step):
            rows = slice(start, start + step)
            if not finite(place[rows].copy_(method.weight(self.p, old[rows], rows))):
                return None
        return place


@torch.no_grad()
def merged(layer: Any, name: str) -> bool:
    """Merge adapter `name`, and say so; False where nothing was done, and `_merge` must.

    Arguments:
        layer: a tuner layer.
        name: one of its adapters.
    """
    found = ordinary(layer, name)
    made = None if found is None else found.made()
    if found is None or made is None:
        return False
    saved = Saved(weight=(storage.DENSE, found.weight.data))
    if found.bias is not None:
        saved["bias"] = storage.DENSE, found.bias[0].data
    layer.__dict__.update(_saved=saved, _merged=[name])  # first, so that an interrupted write is taken back
    _write(layer, found, made)
    layer._replan()
    return True


@torch.no_grad()
def merged_for_good(layer: Any, found: Change, made: Tensor | None) -> bool:
    """Write what `ordinary` has found of a layer, and what it made, unless the layer is another by now.

    Arguments:
        layer: the layer.
        found: the change, which is finite.
        made: W'; None: it is made in W's place.
    """
    if layer.tied is not None or layer._modules["base_layer"]._parameters["weight"] is not found.weight:
        return False
    if made is None and found.fold is not None:
        place = found.weight.detach()  # so that changes are counted
        filled(found.fold, place, place, known=True)
    _write(layer, found, made)
    layer.__dict__["_merged"] = [found.p.name]
    layer._replan()
    return True


def _write(layer: Any, found: Change, made: Tensor | None) -> None:
    if made is not None:
        found.weight.data = made
    if found.bias is not None and found.bias[0] is not found.bias[1]:
        put(layer._modules["base_layer"], "bias", found.bias[1])


def given_back(layer: Any) -> bool:
    """Give a layer that was merged here its payload back, and say so; False where `_restore` must."""
    saved, base = layer._saved, layer._modules["base_layer"]
    if type(saved) is not Saved or type(base) is not nn.Linear or "_hf_hook" in base.__dict__ or layer.tied is not None:
        return False
    held = base._parameters
    if not all(own(base, name, payload) for name, (_, payload) in saved.items()):
        return False
    for name, (_, payload) in saved.items():
        held[name].data = payload  # type: ignore[union-attr]
    return True


def ordinary(layer: Any, name: str) -> Change | None:
    """What an adapter changes of a layer, where nothing about the layer is out of the ordinary."""
    kind = type(layer)
    key = kind, kind.get_delta_weight, kind.merge
    if key not in _ordinary:
        foreign = stated_outside(kind, "get_delta_weight") or stated_outside(kind, "merge")
        _ordinary[key] = not foreign and {getattr(kind, step).__module__ for step in STEPS} <= OWN
    base, d = layer._modules["base_layer"], layer.__dict__
    if not _ordinary[key] or type(base) is not nn.Linear or type(layer.view) is not LinearView or "_hf_hook" in d:
        return None
    if layer._disabled or layer._merged or layer._saved is not None or layer.tied is not None:
        return None
    if any(n != name and n in layer.adapters for n in layer._active) or "_hf_hook" in base.__dict__:
        return None
    weight, p = base._parameters.get("weight"), layer.adapters[name]
    if weight is None or weight.dim() != 2 or weight.is_inference() or not own(base, "weight"):
        return None
    if is_spread(weight) or any(is_spread(t) or t.is_meta for t in _tensors(layer, p)):
        return None
    p.method.refuse_merge(p)
    b = base._parameters.get("bias")
    new = p.method.bias(p, b)
    if (b is None and new is not None) or (b is not None and not own(base, "bias")) or "bias" not in base._parameters:
        return None
    fold = p.method.fold(p, torch.promote_types(weight.dtype, torch.float32), True)
    return Change(weight, p, fold, None if b is None or new is None else (b, new))


def _tensors(layer: Any, p: Adapter) -> Iterator[Tensor]:
    yield from layer.adapter_parameters(p.name)
    for home in p.shared.values():
        yield from home.parameters()
        yield from home.buffers()
