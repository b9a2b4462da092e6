"""Names of modules against the patterns of a configuration, compiled once, linear in the number of modules.

Two rules occur. A *selector* (targets, exclusions) is a list of names and suffixes, or a regular expression
for the whole name. A *table* (`rank_pattern` and its kin) maps regular expressions to values; each must match
the whole name or all that follows one of its dots.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ..errors import PatternError, nearest

# The field of a table, and the fields that its values stand for (the first that the configuration has).
TABLES: dict[str, tuple[str, ...]] = {
    "rank_pattern": ("r", "effective_rank"),
    "alpha_pattern": ("lora_alpha", "alpha"),
    "n_frequency_pattern": ("n_frequency",),
    "block_size_pattern": ("block_size",),
    "lambda_pattern": ("delora_lambda",),
}
_BASE = "base_layer"  # the name in a path below which a target's parts are
_PLAIN = re.compile(r"[\w.\-]*")
_ENDLESS = re.compile(r"\)[*+{]|([*+}].*){4}")  # a repeated group, or many repeats
# Where a key matches: the whole name or all after a dot; all after a dot alone; or anywhere.
_RULES = {"tail": r"(?:.*\.)?(?:{})$", "below": r".*\.{}$", "anywhere": r".*?(?:{})"}


def suffixes(name: str) -> Iterator[str]:
    """The name and what follows each of its dots: "a.b.c", "b.c", "c"."""
    yield name
    while dot := name.find(".") + 1:
        name = name[dot:]
        yield name


class Selector:
    """A list of names and suffixes, or one regular expression that must match the whole name.

    Attributes:
        entries: the entries in sorted order; one for a regular expression.
        used: the entries that have selected a name so far.
    """

    def __init__(self, entries: str | Iterable[str], field: str) -> None:
        self.regex = compiled(entries, field) if isinstance(entries, str) else None
        self.entries = [entries] if isinstance(entries, str) else sorted(entries)
        self.used: set[str] = set()
        self._set = set(self.entries)
        self._dotted = any("." in entry for entry in self.entries)
        self._last = {entry.rpartition(".")[2] for entry in self.entries}

    def find(self, name: str) -> str | None:
        """The entry that selects `name` (the longest, and so an exact one first), or None."""
        if self.regex is not None:
            if self.regex.fullmatch(name) is None:
                return None
            self.used.add(self.entries[0])
            return self.entries[0]
        last = name[name.rfind(".") + 1 :]
        if last not in self._last:
            return None
        if not self._dotted and name:
            self.used.add(last)
            return last
        found = [s for s in suffixes(name) if s in self._set and (s or not name)]
        self.used.update(found)
        return found[0] if found else None

    def unused(self) -> list[str]:
        """The entries that have selected nothing."""
        return [entry for entry in self.entries if entry not in self.used]


def compiled(pattern: str, field: str) -> Any:
    """The compiled regular expression; ValueError with the field and the position if it is none."""
    try:
        plain = re.compile(pattern)
    except re.error as error:
        raise PatternError(
            f"{field}={pattern!r} is not a regular expression: {error}. Mend it, or pass a list of module names."
        ) from error
    return Watched(plain, field) if _ENDLESS.search(pattern) and find_spec("regex") else plain


class Watched:
    """A regular expression whose repeats may need time without end for some names: it gets a second.

    Adapter files come from others, and `re` cannot be interrupted; the package `regex` (of transformers) can.
    """

    def __init__(self, plain: re.Pattern[str], field: str) -> None:
        import regex

        self.pattern, self.field = plain.pattern, field
        self._regex = regex.compile(plain.pattern, regex.V0)

    def match(self, name: str) -> Any:
        """As of `re`."""
        return self._timed(self._regex.match, name)

    def fullmatch(self, name: str) -> Any:
        """As of `re`."""
        return self._timed(self._regex.fullmatch, name)

    def search(self, name: str) -> Any:
        """As of `re`."""
        return self._timed(self._regex.search, name)

    def _timed(self, find: Any, name: str) -> Any:
        try:
            return find(name, timeout=1)
        except TimeoutError as error:
            raise ValueError(
                f"{self.field}={self.pattern!r} takes longer than a second for the name {name!r}, as repeats within "
                "repeats do. Write it without them, or pass a list of module names."
            ) from error


class Table:
    """The keys of a pattern dictionary in their order; keys without special characters but dots are looked up.

    The `rule` of the others is one of `_RULES`. A dot stands for any character in both.
    """

    def __init__(self, keys: Iterable[str], field: str, rule: str = "tail") -> None:
        self.keys = list(keys)
        self._plain = {key: i for i, key in enumerate(self.keys) if rule != "anywhere" and _PLAIN.fullmatch(key)}
        self._dots: dict[int, set[tuple[int, ...]]] = {}  # by length of keys, where they have dots
        for key in self._plain:
            if "." in key:
                self._dots.setdefault(len(key), set()).add(tuple(i for i, c in enumerate(key) if c == "."))
        self._whole = rule != "below"
        form = _RULES[rule]
        self._regex = [
            (i, compiled(form.format(key), field)) for i, key in enumerate(self.keys) if key not in self._plain
        ]

    def matches(self, name: str) -> list[str]:
        """All keys that match the name, in the dictionary's order."""
        found = {self._plain[s] for s in self._readings(name) if s in self._plain} if self._plain else set()
        found.update(i for i, regex in self._regex if regex.match(name))
        keys = [self.keys[i] for i in sorted(found)]
        return keys if self._whole else sorted(keys, key=name.__eq__)  # there a name of its own is asked for last

    def _readings(self, name: str) -> Iterator[str]:
        """The name and what follows its dots, also with dots where keys of that length have some."""
        for s in suffixes(name):
            yield s
            for dots in self._dots.get(len(s), ()):
                if (self._whole or s != name) and not all(s[i] == "." for i in dots):
                    yield "".join("." if i in dots else c for i, c in enumerate(s))


@functools.lru_cache(maxsize=64)
def _table(keys: tuple[str, ...], field: str, rule: str) -> Table:
    return Table(keys, field, rule)


def table(patterns: Mapping[str, Any], field: str = "pattern", config: Any = None) -> Table:
    """The compiled keys of `patterns`, the value of a field of a configuration."""
    rules = (("anywhere", getattr(config, "searched", ())), ("below", getattr(config, "below", ())))
    return _table(tuple(patterns), field, next((rule for rule, fields in rules if field in fields), "tail"))


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches `name` or a suffix of it after a dot; else `default`.

    Arguments:
        patterns: regular expressions and values, tried in order; "^k" pins k to the top level.
        name: the module's path, with the parameter's name for a targeted parameter.
        default: the fallback.
    """
    if not patterns:
        return default
    found = table(patterns).matches(name)
    return patterns[found[0]] if found else default


def tables(config: Any) -> dict[str, Mapping[str, Any]]:
    """The pattern dictionaries of a configuration that hold something, by field."""
    fields = (*TABLES, "module_config")
    found = {field: getattr(config, field, None) for field in fields}
    return {field: value for field, value in found.items() if value and not _is_mask(value)}


def _is_mask(patterns: Mapping[str, Any]) -> bool:
    """Whether it is AdaLoRA's record of kept ranks (lists of bool) rather than a table of settings."""
    return all(isinstance(value, list) for value in patterns.values())


class _Resolved:
    """The per-module copies of one configuration, and what they were made from."""

    def __init__(self, config: Any) -> None:
        self.made_from = _state(config)
        self.by_path: dict[str, Any] = {}
        self.copies: list[tuple[dict[str, Any], Any]] = []

    def copy(self, config: Any, changes: dict[str, Any]) -> Any:
        """The copy with these changes; modules with equal settings share one."""
        for known, made in self.copies:
            if known == changes:
                return made
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the copy warns of, the original has said
            made = dataclasses.replace(config, **dict.fromkeys(tables(config)), **changes)
        for name, value in vars(config).items():
            vars(made).setdefault(name, value)
        self.copies.append((changes, made))
        return made


_resolved: dict[int, _Resolved] = {}


def _state(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return dict(vars(config)), {field: dict(value) for field, value in tables(config).items()}


def part_of(path: str) -> str | None:
    """The path of the target that the module there is a part of, as attention's out-projection is; None if of none."""
    target, found, _ = f".{path}".partition(f".{_BASE}.")
    return target[1:] if found else None


def holding(keys: Table, field: str, path: str) -> list[str]:
    """The keys that hold for the target or the part at `path`, the first of which counts; all of `module_config`.

    A part of a target (attention's out-projection) has the target's settings, but for keys that name its own path.
    """
    found, target = keys.matches(path), part_of(path)
    if target is None:
        return found
    if field == "module_config":
        return keys.matches(target) + found
    return [key for key in found if _BASE in key] or keys.matches(target)


def special(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """The values, by path, that a table has to hold where all others are the usual one."""
    given = ((path, value, part_of(path)) for path, value in values.items())
    return {
        path: value for path, value, whole in given if value != (usual if whole is None else values.get(whole, usual))
    }


def _changes(config: Any, path: str) -> dict[str, Any]:
    """What the tables of a configuration change for one module; `module_config` has the last word."""
    changes: dict[str, Any] = {}
    for field, patterns in tables(config).items():
        found = holding(table(patterns, field, config), field, path)
        if field == "module_config":
            for key in found:
                changes.update(patterns[key])
        elif found:
            name = next((n for n in TABLES[field] if hasattr(config, n)), None)
            if name is not None:
                changes[name] = patterns[found[0]]
    return {name: value for name, value in changes.items() if getattr(config, name, None) != value}


def settings(config: Any, path: str) -> Any:
    """The configuration as it holds for one module: `config` itself, or a copy with the patterns resolved.

    Arguments:
        config: the configuration; `rank_pattern`, `alpha_pattern` and `module_config` are consulted.
        path: the module's path, with the parameter's name for a targeted parameter.

    Copies are kept: the same path gives the same object, until the configuration changes.
    Raises ValueError if `module_config` names a field that does not exist.
    """
    if not tables(config):
        return config
    known = _resolved.get(id(config))
    if known is None or known.made_from != _state(config):
        if known is None:
            weakref.finalize(config, _resolved.pop, id(config), None)
        known = _resolved[id(config)] = _Resolved(config)
    if path not in known.by_path:
        changes = _changes(config, path)
        _check_fields(config, changes, path)
        known.by_path[path] = known.copy(config, changes) if changes else config
    return known.by_path[path]


def _check_fields(config: Any, changes: dict[str, Any], path: str) -> None:
    fields = [field.name for field in dataclasses.fields(config) if field.init]
    for name in changes:
        if name not in fields:
            raise ValueError(
                f"module_config sets {name!r} for {path!r}, which {type(config).__name__} does not have."
                f"{nearest(name, fields)} Use one of its fields: {', '.join(fields)}."
            )
