"""Whether values from a file are of the kind that a configuration's fields have."""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any

KINDS = {
    "a whole number": (int,),
    "a number": (int, float),
    "a text": (str, enum.Enum),
    "a list": (list, tuple, set, frozenset),
    "a dictionary": (dict,),
}


def checked_fields(kind: type, values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The values, whole numbers as integers.

    Files of other releases and other programs are not stricter than this: every field may be null, and scales (`alpha`,
    `lambda`) may be fractions.

    Arguments:
        kind: the class of the configuration.
        values: its fields.
        origin: where they come from, for the message.

    Raises TypeError for a value that is no number, text, list or dictionary where its field is one.
    """
    allowed = _allowed(kind)
    checked = dict(values)
    for name, value in values.items():
        kinds = allowed.get(name)
        if kinds is None or dataclasses.is_dataclass(value) or (value is None and "prng_key" not in name):
            continue
        if kinds == {"a whole number"} and isinstance(value, bool):
            value = checked[name] = int(value)
        if "a whole number" in kinds and (_scale(name) or "a number" not in kinds) and _whole(value):
            value = checked[name] = int(value)
        if not any(isinstance(value, KINDS[k]) for k in kinds) or (isinstance(value, int) and abs(value) >= 2**63):
            raise TypeError(
                f"{origin} sets {name} to {value!r:.80}, which is {type(value).__name__}; {' or '.join(sorted(kinds))} "
                "is expected. Restore the file, or save the adapter again."
            )
    return checked


def _whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _scale(name: str) -> bool:
    return "alpha" in name or "lambda" in name


@functools.cache
def _allowed(kind: type) -> dict[str, set[str]]:
    """{field: what its values may be}; fields whose annotation says something else are left out."""
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):  # names that only a type checker sees
        return {}
    found = {name: _kinds(hint) for name, hint in hints.items()}
    return {
        name: kinds | ({"a number"} if _scale(name) and "a whole number" in kinds else set())
        for name, kinds in found.items()
        if kinds
    }


def _kinds(hint: Any) -> set[str]:
    """What an annotation allows; empty if it allows anything."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        parts = [_kinds(h) for h in typing.get_args(hint) if h is not NoneType]
        return set().union(*parts) if all(parts) else set()
    if typing.get_origin(hint) is typing.Literal:
        return {k for value in typing.get_args(hint) for k, types in KINDS.items() if isinstance(value, types)}
    plain = typing.get_origin(hint) or hint
    if dataclasses.is_dataclass(plain):
        return {"a dictionary"}
    if plain is bool:
        return {"a number"}
    return {k for k, types in KINDS.items() if isinstance(plain, type) and issubclass(plain, types)} - (
        {"a number"} if plain is int else set()
    )
