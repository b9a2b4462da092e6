"""Contexts over the same state that are left in any order: each undoes what it did, and nothing else.

Contexts in generators, callbacks and threads are not always left in the order opposite to that in which they were
entered. Each knows the state that it found. One that is left while later ones are open hands that to the next of these,
for which it is from then on the state that was found.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class Opened(Generic[T]):
    """One open context: the state that it found, by what has it, and what it did."""

    def __init__(self, found: dict[Any, T], did: Any):
        self.found, self.did = found, did


class Open(Generic[T]):
    """The open contexts of each owner, in the order in which they were entered."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Hashable, list[Opened[T]]] = WeakKeyDictionary()

    def enter(self, owner: Hashable, found: dict[Any, T], did: Any = None) -> Opened[T]:
        """A context is entered, which finds this state."""
        mine = Opened(found, did)
        self._of.setdefault(owner, []).append(mine)
        return mine

    def leave(self, owner: Hashable, mine: Opened[T]) -> list[Opened[T]]:
        """It is left: the contexts that were entered later and are open, to which what it found is to be handed."""
        opened = self._of[owner]
        at = opened.index(mine)
        del opened[at]
        return opened[at:]
