"""Checkpoints whose modules have been renamed since: found again by suffix and shape, where the match is unique.

transformers moves modules between releases (`language_model.model.layers` becomes `model.language_model.layers`), and
an adapter of a text model may be put on a model of text and images. A key without a place is then taken to a place
without a tensor if all of this holds; otherwise it stays unexpected, and is reported:

- there is no module of the key's path, so it cannot mean another place;
- path and place end in the same module, have the same numbers in the same order, and the tensor fits;
- no other place has as long an ending in common with it, or every other one is ruled out by the next line;
- the rename, read as a rule (what stands before, old part, new part), takes every key that it applies to to a place;
- no two keys meet at one place.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import PeftWarning
from ..registry import PEFT_TYPE_TO_TUNER_MAPPING, tuner_class
from .entries import PREFIX, Entry, plain
from .pattern import TABLES

Path = tuple[str, ...]
Place = tuple[Path, str]


class Rule(NamedTuple):
    """A rename of modules: behind `before` (numbers are written "*"), `old` becomes `new`."""

    before: Path
    old: Path
    new: Path

    def of(self, path: Path) -> Path | None:
        """Where a path is now; None if the rule says nothing about it."""
        start = len(self.before)
        if _open(path[:start]) != self.before or path[start : start + len(self.old)] != self.old:
            return None
        return path[:start] + self.new + path[start + len(self.old) :]

    def __str__(self) -> str:
        return f"{'.'.join(self.before + self.old)!r} is now {'.'.join(self.before + self.new)!r}"


class Key(NamedTuple):
    """A key in a file: the path of a module, and what follows it ("" if no place has such a tensor)."""

    name: str
    path: Path
    part: str
    shape: tuple[int, ...]
    known: bool = True


def found_again(
    root: nn.Module,
    entries: list[Entry],
    state: Mapping[str, Tensor],
    fits: Callable[[Key, Entry], bool] | None = None,
) -> Mapping[str, Tensor]:
    """The checkpoint under the names that the model has now, in the same order; warns of the rules if there are any.

    Arguments:
        root: the model that the entries' names are relative to.
        entries: the adapter's places.
        state: checkpoint key -> tensor.
        fits: whether a tensor can go to a place; None compares with the tensor that is there.
    """
    fits = _fits if fits is None else fits
    if state.keys() <= {e.key for e in entries}:
        return state
    known = {_bare(plain(e.key)) for e in entries} | {_bare(plain(e.live)) for e in entries}
    held = {k: _bare(plain(k)) for k in state}
    left = [k for k, bare in held.items() if bare not in known]
    taken = set(held.values())
    places = {(path, part): e for e in entries for path, part in [_split(e)]} if left else {}
    free = {place: e for place, e in places.items() if _join(*place) not in taken}
    if not free:
        return state
    keys = [_read(k, state[k], {part for _, part in places}) for k in left]
    new = _proved(_modules(root), keys, free, lambda key, place: place in free and fits(key, free[place]))
    if not new:
        return state
    _tell(new, "Each of their tensors has found its one place by its ending and its shape", stacklevel=6)
    return {_apply(new[k], k) if k in new else k: v for k, v in state.items()}


def of_now(config: Any, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The checkpoint with the names that its method gives its tensors now; older releases may have had others."""
    kind: Any = getattr(config, "peft_type", None)
    old: dict[str, str] = getattr(tuner_class(kind), "older_names", {}) if kind in PEFT_TYPE_TO_TUNER_MAPPING else {}
    if not old:
        return state
    return {".".join([*path, old.get(last, last)]): v for k, v in state.items() for *path, last in [k.split(".")]}


def retargeted(model: nn.Module, config: Any, keys: Collection[str]) -> dict[str, Any]:
    """The settings of a configuration whose targets are found under their new names; nothing if they are not.

    For a file whose `target_modules` select nothing: its keys say which modules were adapted. Warns, with the rules.

    Arguments:
        model: the base model.
        config: the configuration of the file.
        keys: the keys of its tensors.
    """
    start = tuner_class(config.peft_type).prefix
    parts = (tuple(_bare(plain(k)).split(".")) for k in keys)
    ends = ((path, next((i for i, name in enumerate(path) if name.startswith(start)), 0)) for path in parts)
    old = list(dict.fromkeys(path[:end] for path, end in ends if end))
    modules = _modules(model)
    found = [Key(".".join(path), path, "", ()) for path in old if path not in modules]
    places = {(path, "") for path in modules}
    new = _proved(modules, found, places, lambda key, place: place in places)
    if not found or len(new) < len(found):
        return {}
    now = {".".join(p): ".".join((new[".".join(p)].of(p) or p) if ".".join(p) in new else p) for p in old}
    _tell(new, "target_modules are the new names of those that the file has tensors for", stacklevel=7)
    return {
        "target_modules": set(now.values()),
        **tables_of_now(config, now),
        **dict.fromkeys(n for n in ("layers_to_transform", "layers_pattern") if hasattr(config, n)),
    }


def tables_of_now(config: Any, now: Mapping[str, str]) -> dict[str, Any]:
    """The tables of a configuration that name single modules by their paths, under the paths that these have now.

    Arguments:
        config: the configuration.
        now: {path of a module in the file: its path in the model}.
    """
    tables = {t: getattr(config, t, None) for t in (*TABLES, "module_config")}
    return {t: {_now(k, now): v for k, v in values.items()} for t, values in tables.items() if values}


def _now(pattern: str, now: Mapping[str, str]) -> str:
    return now.get(re.sub(r"\\(.)", r"\1", pattern.removeprefix("^")), pattern)


def renamed_paths(entries: list[Entry], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """{path of a module in a file: its path in the model}, from the keys of what went into `found_again` and came out.

    Arguments:
        entries: the adapter's places.
        before, after: checkpoints by key.
    """
    places = {plain(e.key): e for e in entries}
    moved = ((a, _split(places[plain(b)])) for a, b in zip(before, after, strict=True) if a != b and plain(b) in places)
    return {_bare(plain(a)).removesuffix(f".{part}"): ".".join(path) for a, (path, part) in moved}


def _tell(new: Mapping[str, Rule], what: str, stacklevel: int) -> None:
    rules = "; ".join(dict.fromkeys(str(rule) for rule in new.values()))
    text = f"The checkpoint was made for other names of modules: {rules}. {what}."
    warnings.warn(f"{text} Save the adapter again to have the new names in the file.", PeftWarning, stacklevel)


# ---- finding the rules ---------------------------------------------------------------------------------------------


def _modules(root: nn.Module) -> set[Path]:
    return {tuple(_bare(plain(name)).split(".")) for name, _ in root.named_modules()}


def _proved(
    modules: set[Path], keys: list[Key], free: Collection[Place], fits: Callable[[Key, Place], bool]
) -> dict[str, Rule]:
    """{key: the rule that takes it to its place without a doubt}."""
    keys = [key for key in keys if key.path and key.path not in modules]
    by_end: dict[tuple[str, Path, str], list[Path]] = defaultdict(list)
    for path, part in free:
        by_end[path[-1] if path else "", _numbers(path), part].append(path)
    rules: dict[Rule, bool] = {}

    def holds(rule: Rule) -> bool:
        if rule not in rules:
            ends = [(key, path) for key in keys for path in [rule.of(key.path)] if path is not None]
            rules[rule] = all(fits(key, (path, key.part)) for key, path in ends if key.known)
        return rules[rule]

    chosen: dict[Key, Rule] = {}
    for key in keys:
        candidates = by_end.get((key.path[-1], _numbers(key.path), key.part), ())
        found = [p for p in candidates if fits(key, (p, key.part))]
        best = max((_common(key.path, p) for p in found), default=0)
        sure = [rule for p in found if _common(key.path, p) == best for rule in [_rule(key.path, p)] if holds(rule)]
        if len(sure) == 1:
            chosen[key] = sure[0]
    met = Counter((rule.of(key.path), key.part) for key, rule in chosen.items())
    doubtful = {rule for key, rule in chosen.items() if met[rule.of(key.path), key.part] > 1}
    return {key.name: rule for key, rule in chosen.items() if rule not in doubtful}


def _rule(old: Path, new: Path) -> Rule:
    """The rule that takes one path to another: what they do not have in common at the front and at the end."""
    end = _common(old, new)
    a, b = old[: len(old) - end], new[: len(new) - end]
    front = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return Rule(_open(a[:front]), a[front:], b[front:])


def _common(a: Path, b: Path) -> int:
    """How many names two paths have in common at the end."""
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count


def _fits(key: Key, entry: Entry) -> bool:
    p = entry.adapter
    return tuple(entry.tensor.shape) == key.shape or (p is not None and p.method.takes(p, entry.part, key.shape))


def _apply(rule: Rule, key: str) -> str:
    prefix = PREFIX if key.startswith(PREFIX) else ""
    return prefix + ".".join(rule.of(tuple(_bare(plain(key)).split("."))) or ())


# ---- names ---------------------------------------------------------------------------------------------------------


def _split(entry: Entry) -> tuple[Path, str]:
    """The path of the module that a place belongs to, and the rest of its key."""
    key = _bare(plain(entry.key))
    part = entry.part or entry.attr
    return tuple(filter(None, key.removesuffix(part).rstrip(".").split("."))), part


def _read(key: str, value: Tensor, parts: set[str]) -> Key:
    """A key of a file, taken apart where one of the model's tensors would begin."""
    name = _bare(plain(key))
    part = max((p for p in parts if name.endswith(f".{p}")), key=len, default="")
    path = name.removesuffix(f".{part}") if part else ""
    return Key(key, tuple(filter(None, path.split("."))), part, tuple(value.shape), part != "")


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX)


def _join(path: Path, part: str) -> str:
    return ".".join([*path, part])


def _numbers(path: Path) -> Path:
    return tuple(name for name in path if name.isdigit())


def _open(path: Path) -> Path:
    return tuple("*" if name.isdigit() else name for name in path)
