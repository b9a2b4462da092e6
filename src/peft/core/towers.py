"""The parts of a model that read text, see images or hear sounds, by what its configuration says, and its experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import listing

KINDS = {"vision_config": "vision", "audio_config": "audio"}  # as configurations of transformers name them
_PARTS = {**KINDS, "text_config": "text"}
_INPUTS = {"pixel_values": "vision", "input_features": "audio", "input_values": "audio"}  # of models of one part
_EXPERTS = re.compile(r"(?:^|\.)[^.]*expert[^.]*(?:\.|$)", re.IGNORECASE)


def parts(model: nn.Module) -> dict[str, str]:
    """Paths of the outermost modules that are built from the configuration of a part, each with its kind."""
    modules = [(path, m, c) for path, m in model.named_modules() if (c := m.__dict__.get("config")) is not None]
    whole = {type(c) for _, _, c in modules if any(hasattr(c, name) for name in _PARTS)}
    kinds: dict[type, str] = {}
    for _, _, config in modules:
        found = ((kind, getattr(config, name, None)) for name, kind in _PARTS.items())
        kinds.update({type(part): kind for kind, part in found if part is not None and type(part) not in whole})
    outermost: dict[str, str] = {}
    for path, _, config in modules:
        kind = kinds.get(type(config))
        if kind and path and not any(path.startswith(f"{above}.") for above in outermost):
            outermost[path] = kind
    return outermost


def within(model: nn.Module, paths: Iterable[str]) -> Iterator[str]:
    """A sentence for each tower in which some of the targets lie, and some outside of all, with the way to leave it."""
    paths, found = list(paths), {path: kind for path, kind in parts(model).items() if kind != "text"}
    inside = {tower: [p for p in paths if _lies(p, tower)] for tower in found}
    if sum(map(len, inside.values())) == len(paths):
        return
    for tower, held in inside.items():
        if held:
            yield (
                f"{len(held)} of {len(paths)} targets lie in {tower!r}, the {found[tower]} part of the model. "
                f"exclude_modules={re.escape(tower) + '[.].*'!r} leaves them out."
            )


def scope(model: nn.Module, wanted: str | Collection[str]) -> Callable[[str], bool]:
    """Whether a path lies in one of the wanted parts.

    Arguments:
        model: the model. One whose configuration names no parts is one of the kind of its main input.
        wanted: "text" (the language model and its output head), "vision", "audio", or "experts" (in any part). What
            joins parts, such as a projector, lies in none of the first three.

    Raises ValueError if the model has no such part.
    """
    wanted = {wanted} if isinstance(wanted, str) else set(wanted)
    found = parts(model)
    if not found and getattr(model, "config", None) is not None:
        found = {"": _INPUTS.get(getattr(model, "main_input_name", ""), "text")}
    elif "text" in found.values() and (head := _head(model)) is not None:
        found[head] = "text"
    has = {*found.values(), *(["experts"] if any(_EXPERTS.search(path) for path, _ in model.named_modules()) else ())}
    if missing := sorted(wanted - has):
        raise ValueError(
            f"scope={listing(missing)} names no part of {type(model).__name__}, whose configuration and names tell "
            f"these: {listing(sorted(has)) or 'none'}. Choose the modules by `target_modules` and `exclude_modules`."
        )
    chosen, experts = [path for path, kind in found.items() if kind in wanted], "experts" in wanted
    return lambda path: any(_lies(path, part) for part in chosen) or (experts and _EXPERTS.search(path) is not None)


def _lies(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}.")


def _head(model: Any) -> str | None:
    """The path of the output embedding."""
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return next((path for path, m in model.named_modules() if m is head), None)
