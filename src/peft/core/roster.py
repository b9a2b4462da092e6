"""The layers of a tuner, and the parameters of each adapter, found once until something is added or taken away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .host import changes
from .layer import BaseTunerLayer

Tables = dict[str, list[dict[str, Any]]]  # name of a parameter -> the tables of modules that hold one


class Roster:
    """What a switch of adapters has to do with.

    Arguments:
        tuner: whose `layers` are looked at.

    Attributes:
        layers: those that follow a switch (`Deferred`).
        others: what is switched one by one.
    """

    def __init__(self, tuner: Any) -> None:
        self.changes = changes()
        found = [layer for _, layer in tuner.layers()]
        plain, call = BaseTunerLayer.activate, tuner.__dict__.get("call")
        self.layers = [x for x in found if getattr(type(x), "activate", None) is plain and x.call is call]
        mine = set(map(id, self.layers))
        self.others = [x for x in found if id(x) not in mine]
        self._places: dict[str, tuple[Tables, Tables]] = {}

    @property
    def current(self) -> bool:
        """Whether nothing has been added or taken away since."""
        return self.changes == changes()

    def train(self, known: Iterable[str], trained: Sequence[str]) -> None:
        """Make the parameters of the adapters `trained` trainable, and freeze those of all others that are known.

        Raises KeyError or AttributeError where a module does not hold its parameter any more.
        """
        for name in known:
            flag = name in trained
            free, kept = self._of(name)
            for key, tables in free.items():
                for table in tables:
                    table[key].requires_grad = flag
            for key, tables in kept.items():
                for table in tables:
                    table[key].requires_grad = False

    def looks_frozen(self, known: Iterable[str]) -> bool:
        """Whether the first and the last parameter of each adapter is frozen."""
        ends = (tables[i][key] for name in known for key, tables in self._of(name)[0].items() for i in (0, -1))
        return not any(parameter.requires_grad for parameter in ends)

    def _of(self, name: str) -> tuple[Tables, Tables]:
        """Where the parameters of an adapter are: those that can be trained, and those that stay frozen."""
        if name not in self._places:
            free, kept = self._places[name] = {}, {}
            for layer in self.layers:
                never = set(map(id, layer.never_trained(name)))
                for table, key in layer.places(name):
                    (kept if id(table[key]) in never else free).setdefault(key, []).append(table)
        return self._places[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
