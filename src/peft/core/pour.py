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
from .layer import BaseTunerLayer
from .method import Method
from .mold import Cast, Mold

_kind = attrgetter("dtype", "device")


class Job(NamedTuple):
    """What a new adapter is in one layer: the form, and which tensors of the file are its parts, in their order."""

    layer: BaseTunerLayer
    path: str
    base: nn.Module
    form: Any
    mold: Mold
    parts: list[tuple[str, torch.dtype]]


def jobs_of(found: list[Cast], layout: Layout) -> list[Job] | None:
    """What goes where, if a file holds the tensors of these layers and no others; None where there is more to ask."""
    jobs, count = [], 0
    plain = {id(c.mold): c.mold for c in found}.values()
    if not found or not all(map(_named_alike, plain)) or any(c.form[-1].type == "meta" for c in found):
        return None
    for layer, path, form, mold in found:
        parts = []
        for key, shape, dtype in mold.tensors:
            name = f"{PREFIX}{path}.{key}.weight"
            info = layout.get(name)
            if info is None or info.shape != shape or not info.dtype.is_floating_point:
                return None
            parts.append((name, dtype))
        count += len(parts)
        jobs.append(Job(layer, path, layer._modules["base_layer"], form, mold, parts))  # type: ignore[arg-type]
    return jobs if count == len(layout) else None


def _named_alike(mold: Mold) -> bool:
    """Whether files hold the tensors as they are, under their own names, and nobody has to be told of them."""
    kind = type(mold.method)
    own = (kind.checkpoint_key, kind.parts, kind.written)
    return own == (Method.checkpoint_key, Method.parts, Method.written) and not mold.method.copies


def kinds_of(jobs: list[Job]) -> list[tuple[torch.dtype, torch.device]]:
    """Of which dtype and where the parameters of all layers are to be."""
    return [(dtype, job.form[-1]) for job in jobs for _, dtype in job.parts]


def parameters(found: list[Any], kinds: list[tuple[torch.dtype, torch.device]]) -> list[nn.Parameter]:
    """Tensors that nobody else has, as frozen parameters of these kinds."""
    if [*map(_kind, found)] != kinds:
        found = [t.to(dtype=dtype, device=device) for t, (dtype, device) in zip(found, kinds, strict=True)]
    if {*map(type, found)} != {Tensor}:
        return [nn.Parameter(t, requires_grad=False) for t in found]
    for tensor in found:
        tensor.__class__ = nn.Parameter  # as such a tensor becomes one, without another one beside it
    return found


def pour(name: str, jobs: list[Job], state: Mapping[str, Tensor]) -> None:
    """Put the tensors of a file, which nobody else has, into the places of those without memory."""
    made = iter(parameters([state[key] for job in jobs for key, _ in job.parts], kinds_of(jobs)))
    for job in jobs:
        modules: Any = job.layer._modules
        for key, *_ in job.mold.tensors:
            table = modules[key]._modules[name]._parameters
            new = next(made)
            if table["weight"].requires_grad:
                new.requires_grad = True
            table["weight"] = new
