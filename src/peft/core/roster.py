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
        found: these, where they are known.

    Attributes:
        layers: those that follow a switch (`Deferred`).
        others: what is switched one by one.
    """

    def __init__(self, tuner: Any, found: list[Any] | None = None) -> None:
        self.changes = changes()
        found = [layer for _, layer in tuner.layers()] if found is None else found
        plain, call = BaseTunerLayer.activate, tuner.__dict__.get("call")
        kinds = {kind for kind in set(map(type, found)) if getattr(kind, "activate", None) is plain}
        self.layers = [x for x in found if type(x) in kinds and x.call is call]
        mine = set(map(id, self.layers)) if len(self.layers) < len(found) else ()
        self.others = [x for x in found if id(x) not in mine] if mine or not self.layers else []
        self._places: dict[str, tuple[Tables, Tables]] = {}

    def told(self, name: str, tables: list[dict[str, Any]], layers: Iterable[Any]) -> None:
        """What is known of a new adapter: tables whose only parameter is a `weight`, and the layers beside theirs."""
        free, kept = self._gathered(name, layers)
        if tables:
            free.setdefault("weight", []).extend(tables)
        self._places[name] = free, kept

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
            self._places[name] = self._gathered(name, self.layers)
        return self._places[name]

    def _gathered(self, name: str, layers: Iterable[Any]) -> tuple[Tables, Tables]:
        free: Tables = {}
        kept: Tables = {}
        for layer in layers:
            never = set(map(id, layer.never_trained(name)))
            for table, key in layer.places(name):
                (kept if id(table[key]) in never else free).setdefault(key, []).append(table)
        return free, kept

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
