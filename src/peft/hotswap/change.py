"""What becomes of an adapter in one layer when another one's weights take its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.buffers import tensors_below
from ..core.entries import Entry
from ..core.fill import as_held
from ..core.method import Site
from ..core.sharded import is_mesh
from ..core.stack import Adapter
from ..kernels.modes import HELD

Undo = list[Callable[[], Any]]


@dataclass
class Change:
    """What becomes of the adapter in one layer.

    Arguments:
        p: the adapter there.
        settings: the new configuration as it holds for the layer.
        places: the tensors that are there.
        plain: the new adapter's plain values.
        shapes: {name of a tensor in the layer: the shape that the new adapter asks for}.
        tensors: {name of a tensor in the layer: its new value}.
        neutral: the new adapter has nothing here.
        changed: plain values have changed on which more depends.
    """

    p: Adapter
    settings: Any
    places: list[Entry]
    plain: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    neutral: bool = False
    changed: bool = False
    site: Any = None
    modules: dict[str, Any] | None = None

    def build(self, site: Site) -> None:
        """Let the method say what the new adapter consists of here, on the meta device."""
        self.site, self.modules = site, {}
        for key, value in self.p.method.build(site).items():
            if not isinstance(value, (Tensor, nn.Module)):
                self.plain[key] = value
                continue
            self.modules[key] = value
            if isinstance(value, nn.Module):
                found = {f"{key}.{leaf}": getattr(owner, attr) for owner, leaf, attr in tensors_below(value)}
            else:
                found = {key: value} if isinstance(value, (nn.Parameter, nn.Buffer)) else {}
            self.shapes.update({self.p.method.checkpoint_key(k): tuple(t.shape) for k, t in found.items()})

    def made(self) -> dict[str, Any]:
        """The modules and tensors of the new adapter here, on the meta device."""
        if self.modules is None:
            self.build(self.site)
        return self.modules or {}


class Fit(NamedTuple):
    """A tensor that is there, the part of it that is written, its new value; the rest becomes zero."""

    whole: Tensor
    part: Tensor
    value: Tensor


def derive(change: Change, fits: list[Fit]) -> None:
    """Compute what depends on the base weight anew, and note what the forward needs."""
    p = change.p
    with p.layer.readable():
        p.method.derive(p, p.layer.stack(()))
        if change.neutral:
            p.method.rest(p)
    for fit in fits if not change.neutral else ():  # what is derived may be learnt: magnitudes
        fit.part.copy_(fit.value)
    p.layer._replan()


def fitting(change: Change) -> list[Fit] | None:
    """The new values and where they go in the tensors that are there, or None if some do not fit."""
    p, found = change.p, list[Fit]()
    if {e.part for e in change.places} != change.tensors.keys():
        return None
    for place in change.places:
        value: Tensor | None = change.tensors[place.part]
        whole = part = place.tensor
        if value is not None and value.shape != whole.shape:
            window = p.method.window(p, place.part, whole, tuple(value.shape))
            if window is None:
                value = p.method.fitted(p, place.part, value, tuple(whole.shape))
            else:
                part = window
        if value is None:
            return None
        found.append(Fit(whole, part, as_held(value, part)))
    return found


def rebuild(change: Change, undo: Undo) -> None:
    """Put the modules that the new configuration builds in place of those that are too small."""
    p, layer = change.p, change.p.layer
    first = layer.slots(p.name)[0].tensor
    if is_mesh(first) and not layer._splits():
        raise RuntimeError(
            f"The new adapter is larger at {p.path!r} than the one that fully_shard has spread, which knows the "
            "tensors that are there and takes no others. Load it under a name of its own, or swap before fully_shard "
            "is called."
        )
    flags = {q.requires_grad for q in layer.adapter_parameters(p.name)}
    homes = {k: h for k, h in layer._modules.items() if k != "base_layer" and p.name in h}
    before = {k: h[p.name] for k, h in homes.items()}

    def back() -> None:
        for key, value in before.items():
            layer._file(key, p.name, value, p)
        layer._replan()

    undo.append(back)
    for key, value in change.made().items():
        layer._file(key, p.name, value, p)
    for slot in layer.slots(p.name):
        value = change.tensors[slot.key].detach().to(first.device, slot.tensor.dtype, copy=True)
        held = slot.owner._parameters if slot.attr in slot.owner._parameters else slot.owner._buffers
        is_parameter = isinstance(slot.tensor, nn.Parameter)
        held[slot.attr] = nn.Parameter(value, requires_grad=any(flags)) if is_parameter else value
    p.method.derive(p, layer.stack(()))
    if change.neutral:
        p.method.rest(p)
    for slot in layer.slots(p.name) if not change.neutral else ():
        slot.tensor.copy_(as_held(change.tensors[slot.key], slot.tensor))
    layer._spread(p, change.site)
    layer._replan()


def write_all(fits: list[Fit], undo: Undo) -> None:
    """Write values into their places, which `undo` takes back."""
    wholes = [fit.whole for fit in fits]
    before = [t.clone() for t in wholes]
    undo.append(lambda: copy_all(wholes, before))
    roomy = [fit.whole for fit in fits if fit.part is not fit.whole]
    if roomy:
        torch._foreach_zero_(roomy)
    copy_all([fit.part for fit in fits], [fit.value for fit in fits])


def copy_all(places: list[Tensor], values: list[Tensor]) -> None:
    """Write values of the same shapes and dtypes into tensors, in one go where all are plain ones."""
    if places and all(type(t) in HELD for t in (*places, *values)):
        torch._foreach_copy_(places, values)
        return
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
