"""The exceptions and warnings of the library, and the one rule of strictness.

What cannot be right raises. What may be intended raises a *named* warning that lists every item; `strict` turns
those warnings into errors, for one call (argument) or for the whole process (`set_strict`, or `PEFT_STRICT=1`).
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

LONGEST = 1000  # characters of what is looked up among names; files may hold far more


class PeftError(Exception):
    """Base class of the library's own errors."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The configuration selects nothing of the model."""


class PeftStrictError(PeftError, ValueError):
    """A warning that `strict` has turned into an error."""


class MisfitError(PeftError, RuntimeError, ValueError):
    """Tensors of a checkpoint do not fit the model; `facts` is the message without advice."""

    def __init__(self, facts: str, advice: str = ""):
        super().__init__(facts + advice)
        self.facts = facts


class UnknownNameError(PeftError, ValueError, KeyError):
    """A name that nothing has: of an adapter, of a method, of a task."""

    __str__ = Exception.__str__  # a KeyError would print the quoted text


class WrongKindError(PeftError, TypeError, ValueError):
    """An argument that is of another type than what it says."""


class IncompleteError(PeftError, TypeError, KeyError):
    """A description lacks what tells its kind."""

    __str__ = Exception.__str__


class OutOfRangeError(PeftError, ValueError, IndexError):
    """A number that counts something beyond its end."""


class NothingToDoError(PeftError, NotImplementedError, AttributeError):
    """What a method has nothing to do for; `hasattr` says so too."""


class PatternError(PeftError, ValueError, re.error):
    """Text that is no regular expression."""


class UnwritableError(PeftError, OSError):
    """A folder or a file cannot be written; `errno` is the system's number."""


class OtherProcessError(PeftError, RuntimeError):
    """Another process of a distributed run has failed in what all of them do together."""


class PeftWarning(UserWarning):
    """Base class of the library's own warnings."""


class UnmatchedTargetWarning(PeftWarning, RuntimeWarning):
    """One of several entries of a configuration selects nothing of the model."""


class MissingTensorsWarning(PeftWarning):
    """A checkpoint lacks tensors that the adapter has."""


class UnexpectedTensorsWarning(PeftWarning):
    """A checkpoint holds tensors that the adapter has no place for."""


class OtherBaseWarning(PeftWarning):
    """A checkpoint was saved from another base model."""


class ChangedConfigWarning(PeftWarning):
    """A configuration file is not the one that was saved with the weights beside it."""


class LossyMergeWarning(PeftWarning):
    """A merge into quantised weights has lost a part of the update."""


class UnknownFieldWarning(PeftWarning):
    """A configuration file holds a field that this version does not know."""


_strict = os.environ.get("PEFT_STRICT", "") not in ("", "0", "false", "False")


def set_strict(strict: bool) -> bool:
    """Turn doubtful cases into errors for the whole process.

    Arguments:
        strict: True makes every `report`ed warning an error; False (the default of a process) only warns.

    Returns the previous setting.
    """
    global _strict
    previous, _strict = _strict, bool(strict)
    return previous


_told = 0


def told() -> int:
    """How often something has been reported."""
    return _told


def report(
    category: type[PeftWarning], message: str, strict: bool | None = None, stacklevel: int = 3, follows: str = ""
) -> None:
    """Warn with `category`, or raise `PeftStrictError` if strictness asks for it.

    Arguments:
        category: the named warning class.
        message: what was found, where, and what to do.
        strict: this call's wish; None follows the process-wide setting.
        stacklevel: as in `warnings.warn`.
        follows: what follows where it is no more than a warning; an error leaves it out.
    """
    global _told
    _told += 1
    if _strict if strict is None else strict:
        raise PeftStrictError(message)
    warnings.warn(message + follows, category, stacklevel=stacklevel)


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint " Did you mean 'x'?" with the closest choice, or "" if nothing is close, as nothing is to a long text."""
    if len(word) > LONGEST:
        return ""
    pool = list(dict.fromkeys(choices))
    close = difflib.get_close_matches(word, pool, n=1, cutoff=0.6)
    if not close:
        lower = {c.lower(): c for c in pool}
        close = [lower[m] for m in difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)]
    return f" Did you mean {close[0]!r}?" if close else ""


def check_adapters(names: Iterable[Any], known: Iterable[str], use: str = "") -> None:
    """Raise UnknownNameError for the first of the names that is no adapter.

    Arguments:
        names: the adapters that are asked for.
        known: those that there are.
        use: what for, to stand behind the name.
    """
    known = sorted(known)
    for name in names:
        if name not in known:
            hint = nearest(str(name), known)
            raise UnknownNameError(
                f"There is no adapter {name!r}{use}.{hint} The model has {listing(known) or 'none'}."
            )


def check_spelling(given: Iterable[str], function: Callable[..., Any], others: Iterable[str]) -> None:
    """Warn of further keyword arguments that are nearly the name of an argument.

    Clients hand on arguments that are for others, so a name that is like none is left alone.

    Arguments:
        given: the names of `**kwargs`.
        function: the function; its named arguments are known.
        others: further names that it takes.
    """
    known = [*function.__code__.co_varnames[: function.__code__.co_argcount], *others]
    for name in given:
        close = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if close:
            text = f"{function.__name__} takes no argument {name!r}, which has no effect. Did you mean {close[0]!r}?"
            report(PeftWarning, text, stacklevel=4)


def listing(items: Iterable[str], most: int = 8) -> str:
    """'a', 'b' and so on, cut after `most` entries with the number left out."""
    items = list(items)
    text = ", ".join(repr(i) for i in items[:most])
    return text + (f" and {len(items) - most} more" if len(items) > most else "")
