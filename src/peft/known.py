"""Configurations that have been read before: a file of the same bytes gives a copy of what it gave, without a look at
each of its fields.

Servers load many adapters of one configuration. What a file says is remembered when it comes a second time, and only if
it can be read without a word: what is doubtful is said each time.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from .errors import told

MOST = 16  # files that are remembered
SCALARS = frozenset([type(None), bool, int, float, str, bytes])


class Content(dict[str, Any]):
    """The fields of a configuration file. Files that say the same share one, and what is worked out of it."""

    @functools.cached_property
    def hash(self) -> str:
        """As `config_hash` has it."""
        from .core.files import config_hash

        return config_hash(self)


class Known(NamedTuple):
    """What a file gave: its content, the class of the configuration, its values, and how those are copied that must."""

    content: Content
    kind: type
    values: dict[str, Any]
    copied: list[tuple[str, Callable[[Any], Any]]]

    def config(self) -> Any:
        """The configuration once more, sharing nothing with the others."""
        config: Any = object.__new__(self.kind)
        values = config.__dict__
        values.update(self.values)
        for name, copier in self.copied:
            values[name] = copier(values[name])
        return config


_found: dict[tuple[type, bytes], Known | None] = {}  # None: seen once


def known(cls: type, raw: bytes, given: Iterable[str]) -> Known | None:
    """What a file gave that was read before.

    Arguments:
        cls: the class that reads it.
        raw: its bytes.
        given: names of fields for which there are other values, where the file has none.
    """
    found = _found.get((cls, raw))
    apart = found is not None and any(name in found.values and name not in found.content for name in given)
    return None if apart else found


def note(cls: type, raw: bytes, content: Content, build: Callable[[Content], Any]) -> None:
    """A file has been read: remember it if it has come before, and says nothing.

    Arguments:
        cls, raw: as for `known`.
        content: its fields.
        build: makes the configuration of content, for which nothing else counts.
    """
    if (cls, raw) not in _found:
        _found[cls, raw] = None
        for key in list(_found)[:-MOST]:
            _found.pop(key, None)  # other threads may do so at the same time
        return
    before = told()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = build(copy.deepcopy(content))
    if not said and told() == before and type(config).__module__.startswith(f"{__package__}."):
        values = dict(vars(config))
        copied = [(k, copier(v)) for k, v in values.items() if type(v) not in SCALARS and not isinstance(v, Enum)]
        _found[cls, raw] = Known(copy.deepcopy(content), type(config), values, copied)


def copier(value: Any) -> Callable[[Any], Any]:
    """What copies a value of a field."""
    plain = type(value) in (list, set, dict, tuple) and all(type(v) in SCALARS for v in value)
    if plain and (type(value) is not dict or all(type(v) in SCALARS for v in value.values())):
        return type(value)
    if isinstance(value, Enum):
        return same
    own = type(value).__module__.startswith(f"{__package__}.") and type(getattr(value, "__dict__", None)) is dict
    return _twin if own and all(type(v) in SCALARS for v in vars(value).values()) else copy.deepcopy


def copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of a configuration's fields, most of which are plain."""
    return {k: v if type(v) in SCALARS else copier(v)(v) for k, v in values.items()}


def same(value: Any) -> Any:
    """A value that needs no copy."""
    return value


def _twin(value: Any) -> Any:
    """A copy of an object of this library's whose values are plain."""
    made = object.__new__(type(value))
    made.__dict__.update(value.__dict__)
    return made
