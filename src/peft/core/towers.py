"""Which parts of a model see images or hear sounds, by what its configuration says of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

KINDS = {"vision_config": "vision", "audio_config": "audio"}  # as configurations of transformers name them


def towers(model: nn.Module) -> dict[str, str]:
    """Paths of the outermost modules that are built from the configuration of a tower, each with its kind."""
    whole: Any = getattr(model, "config", None)
    kinds = {type(part): kind for name, kind in KINDS.items() if (part := getattr(whole, name, None)) is not None}
    kinds.pop(type(whole), None)
    found: dict[str, str] = {}
    for path, module in model.named_modules() if kinds else ():
        kind = kinds.get(type(module.__dict__.get("config")))
        if kind and path and not any(path.startswith(f"{above}.") for above in found):
            found[path] = kind
    return found


def within(model: nn.Module, paths: Iterable[str]) -> Iterator[str]:
    """A sentence for each tower in which some of the targets lie, and some outside of all, with the way to leave it."""
    paths, found = list(paths), towers(model)
    inside = {tower: [p for p in paths if p == tower or p.startswith(f"{tower}.")] for tower in found}
    if sum(map(len, inside.values())) == len(paths):
        return
    for tower, held in inside.items():
        if held:
            yield (
                f"{len(held)} of {len(paths)} targets lie in {tower!r}, the {found[tower]} part of the model. "
                f"exclude_modules={re.escape(tower) + '[.].*'!r} leaves them out."
            )
