"""Which base model an adapter belongs to, told by the names and shapes of the base's parameters.

No number is looked at, so it costs next to nothing, and it is the same whatever the dtype, the quantised storage, the
adapters on the model, and the modules that the adapter brings itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .base_state import original_modules

HASH, SHAPES = "base_fingerprint", "base_shapes"  # keys among a file's remarks
LONGEST = 100_000  # characters of the shapes; the names of most models fold to a thousand
Groups = dict[str, dict[str, int]]
_NUMBERS = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # whole parts of a name


def replaced_by(config: Any) -> tuple[str, ...]:
    """Endings of the names of modules in whose place an adapter of this configuration has its own."""
    return tuple(getattr(config, "modules_to_save", None) or ())


def fingerprint(model: nn.Module, replaced: Collection[str] = ()) -> dict[str, str]:
    """What a file notes of its base model: a hash of names and shapes, and the shapes themselves, alike ones counted.

    Arguments:
        model: a PeftModel, a model with injected layers, or a plain model.
        replaced: endings of the names of modules that the adapter replaces (`modules_to_save`).
    """
    shapes = tuple(_shapes(model, replaced).items())
    noted, text = {HASH: _hash(shapes)}, _told(shapes)
    return {**noted, SHAPES: text} if len(text) <= LONGEST else noted


def difference(noted: Mapping[str, str], model: nn.Module, replaced: Collection[str] = ()) -> list[str]:
    """How a model differs from the base model that a file was saved from, a line for each kind of parameter.

    Other names alone make no difference, nor does another way to pack the same number of parameters: releases of
    transformers rename modules and join experts. Empty if nothing differs, or nothing was noted.

    Arguments:
        noted: the remarks of the file.
        model, replaced: as for `fingerprint`.
    """
    if HASH not in noted or SHAPES not in noted:
        return []
    shapes = _shapes(model, replaced)
    if _hash(tuple(shapes.items())) == noted[HASH]:
        return []
    before, now = _read(noted[SHAPES]), _grouped(shapes)
    if not before or _total(before) == _total(now) or _endings(before) == _endings(now):
        return []
    names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
    return [f"{n}: {_said(before.get(n))} when it was saved, {_said(now.get(n))} here" for n in names]


@functools.lru_cache(maxsize=4)  # adapters of the same models are saved and loaded again and again
def _hash(shapes: tuple[tuple[str, str], ...]) -> str:
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _told(shapes: tuple[tuple[str, str], ...]) -> str:
    return json.dumps(_grouped(dict(shapes)), separators=(",", ":"), sort_keys=True)


def own_modules(model: nn.Module, replaced: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """(prefix of the original name, module) of the base model, without what the adapter replaces."""
    endings, outside = tuple(replaced), None
    for prefix, module in original_modules(model):
        if endings:
            path = prefix[:-1]
            if outside is not None and path.startswith(outside):
                continue
            if path and path.endswith(endings):
                outside = prefix
                continue
        yield prefix, module


def _shapes(model: nn.Module, replaced: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for prefix, module in own_modules(model, replaced):
        if module._parameters or not module._modules:
            for name, shape in _own(module):
                found[prefix + name] = _text(shape)
    return found


@functools.lru_cache(maxsize=1024)  # a model has few
def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def _own(module: nn.Module) -> Iterable[tuple[str, tuple[int, ...]]]:
    """The parameters of one module; of a linear layer those that it stands for, however they are stored."""
    if type(module) is nn.Linear:
        sizes = module.out_features, module.in_features
        whole = "bias" in module._parameters and module._parameters["bias"] is not None
        return (("weight", sizes), ("bias", sizes[:1])) if whole else (("weight", sizes),)
    return _stated(module)


def _stated(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    sizes = _plain(module, "out_features"), _plain(module, "in_features")
    linear = type(sizes[0]) is int and type(sizes[1]) is int and not module._modules
    if linear:
        yield "weight", sizes
    for name, p in module._parameters.items():
        if p is not None and not linear:
            yield name, tuple(getattr(p, "ds_shape", p.shape))
    if linear and getattr(module, "bias", None) is not None:
        yield "bias", sizes[:1]


def _plain(module: nn.Module, name: str) -> Any:
    """An attribute or property, without torch's search among parameters and children."""
    found = module.__dict__.get(name)
    return getattr(module, name) if found is None and hasattr(type(module), name) else found


def _grouped(shapes: Mapping[str, str]) -> Groups:
    groups: dict[str, Counter[str]] = {}
    for name, shape in shapes.items():
        folded = _NUMBERS.sub("*", name)
        groups.setdefault(folded, Counter())[shape] += 1
    return {name: dict(counts) for name, counts in groups.items()}


def _read(text: str) -> Groups:
    """The shapes that a file notes; nothing for what is no such note."""
    try:
        found = json.loads(text)
        return {str(n): {str(s): int(c) for s, c in counts.items()} for n, counts in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _total(groups: Groups) -> int:
    def size(shape: str) -> int:
        return math.prod(int(n) if n.isdigit() else 0 for n in shape.split("x"))

    return sum(size(shape) * count for counts in groups.values() for shape, count in counts.items())


def _endings(groups: Groups) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for name, counts in groups.items():
        for shape, count in counts.items():
            found[".".join(name.split(".")[-2:]), shape] += count
    return found


def _said(counts: dict[str, int] | None) -> str:
    return " and ".join(f"{c} of {s}" for s, c in sorted(counts.items())) if counts else "none"
