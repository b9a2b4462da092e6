"""A file poured into an adapter whose layers are all casts: the molds say what goes where.

The usual adapter is many layers of few forms. What its tensors are called, and of which shapes they are, its molds
know. If the file holds just these, nothing is missing, left over, renamed or fitted, and nothing has to be said; the
tensors take the places of those without memory. Whatever else there is goes the long way, by `entries` and `fill`.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .entries import PREFIX
from .header import Layout
from .method import Method
from .mold import Cast, Mold

_kind = attrgetter("dtype", "device")


class Pouring(NamedTuple):
    """What a new adapter is in all layers; by which keys a file has its tensors, of which kind they are, and where."""

    jobs: list[Cast]
    keys: list[str]
    kinds: list[tuple[torch.dtype, torch.device]]


def pouring_of(casts: list[Cast], layout: Layout) -> Pouring | None:
    """What goes where, if a file holds the tensors of these layers and no others; None where there is more to ask."""
    parts = [(c, *tensor) for c in casts for tensor in c.mold.tensors]
    keys = [f"{PREFIX}{cast.path}.{key}.weight" for cast, key, _, _ in parts]
    infos = [*map(layout.get, keys)]
    if not len(set(keys)) == len(keys) == len(layout) or None in infos:
        return None
    found: list[Any] = infos
    alike = [info.shape for info in found] == [shape for _, _, shape, _ in parts]
    numbers = all(dtype.is_floating_point for dtype in {info.dtype for info in found})
    held = all(form[-1].type != "meta" for form in {cast.form for cast in casts})
    if not (alike and numbers and held and all(map(_named_alike, {id(c.mold): c.mold for c in casts}.values()))):
        return None
    return Pouring(casts, keys, [(dtype, cast.form[-1]) for cast, _, _, dtype in parts])


def _named_alike(mold: Mold) -> bool:
    """Whether files hold the tensors as they are, under their own names, and nobody has to be told of them."""
    kind = type(mold.method)
    own = (kind.checkpoint_key, kind.parts, kind.written)
    return own == (Method.checkpoint_key, Method.parts, Method.written) and not mold.method.copies


def parameters(found: list[Any], kinds: list[tuple[torch.dtype, torch.device]]) -> list[nn.Parameter]:
    """Tensors that nobody else has, as frozen parameters of these kinds."""
    if [*map(_kind, found)] != kinds:
        found = [t.to(dtype=dtype, device=device) for t, (dtype, device) in zip(found, kinds, strict=True)]
    if {*map(type, found)} != {Tensor}:
        return [nn.Parameter(t, requires_grad=False) for t in found]
    for tensor in found:
        tensor.__class__ = nn.Parameter  # as such a tensor becomes one, without another one beside it
    return found


def pour(name: str, pouring: Pouring, state: Mapping[str, Tensor]) -> None:
    """Put the tensors of a file, which nobody else has, into the places of those without memory."""
    made = iter(parameters([state[key] for key in pouring.keys], pouring.kinds))
    for job in pouring.jobs:
        modules: Any = job.layer._modules
        for key, *_ in job.mold.tensors:
            table = modules[key]._modules[name]._parameters
            new = next(made)
            if table["weight"].requires_grad:
                new.requires_grad = True
            table["weight"] = new
