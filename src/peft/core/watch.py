"""Whether what was made of adapters' tensors still holds, told for all layers of a model in one look.

What a look costs decides what may be kept. It reads lists that were laid out when the banks were made, by functions
that run without Python code in between: some hundred nanoseconds for a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..kernels.modes import HELD
from .kept import STEPS, lies_shared
from .stack import Adapter
from .views import SETTLED

_values = dict.values
_version, _weight, _address = attrgetter("_version"), itemgetter("weight"), torch.Tensor.data_ptr


class Watch:
    """Tells whether what some adapters compute their factors from is what it was.

    Attributes:
        tensors: all that they compute them from.
        possible: whether writes to them are counted.
    """

    def __init__(self) -> None:
        self.written = Adapter.written
        self.keyed: list[dict[str, Any]] = []  # tables that are to have
        self.keys: list[str] = []  # these keys, one after the other
        self.homes: list[dict[str, Any]] = []  # tables that are to hold
        self.modules: list[Any] = []  # these modules, and no others
        self.tables: list[dict[str, Any]] = []  # tables whose "weight" is watched
        self.weights: list[Tensor] = []
        self.places: list[tuple[Any, str]] = []  # others: (get, key)
        self.found: list[Any] = []
        self.own: list[dict[str, Any]] = []  # of modules that get another entry when they are hooked or patched
        self.sizes: list[int] = []
        self.hooks: list[Any] = []
        self.tensors: list[Tensor] = []
        self.addresses: list[int] = []
        self.memory: list[Tensor] = []  # held, so that no other tensor gets such an address
        self.versions: list[int] | None = None
        self.steps = STEPS.taken  # when they were noted

    @classmethod
    def on(cls, layer: Any, adapters: Sequence[Adapter]) -> Watch:
        """Of some adapters of a layer."""
        self = cls()
        self.keyed.append(layer._modules)
        self.keys += layer._modules
        for key in ("training", "cast_input_dtype_enabled", "view"):
            self._place(layer.__dict__, key)
        names = [p.name for p in adapters]
        for key, home in layer._modules.items():
            if key == "base_layer" or home is None:
                continue
            here = [n for n in names if n in home._modules]
            if len(here) == len(home._modules):
                self.homes.append(home._modules)
                self.modules += home._modules.values()
            for name in here:
                if len(here) < len(home._modules):
                    self._place(home._modules, name)
                self._look(home._modules[name])
            for held in (home._parameters, home._buffers):
                for name in names:
                    if name in held:
                        self._note(held, name)
        for p in adapters:
            for home in p.shared.values():
                self._note(home._parameters if p.name in home._parameters else home._buffers, p.name)
        return self

    @classmethod
    def over(cls, watches: Sequence[Watch]) -> Watch:
        """One for all of these, which finds a change where one of them does."""
        self = cls()
        for w in watches:
            for name, mine in self.__dict__.items():
                if type(mine) is list:
                    mine += w.__dict__[name]
            if w.written != self.written:
                self.written = -1
        self.steps = min((w.steps for w in watches), default=self.steps)
        versions = [w.versions for w in watches]
        self.versions = None if None in versions else [v for each in versions for v in each or ()]
        return self

    def add(self, place: dict[str, Any], key: str, table: dict[str, Any], name: str) -> None:
        """Watch a module that stands at `place[key]`, and a tensor of its `table`."""
        self._place(place, key)
        self._note(table, name)

    def _look(self, module: Any) -> None:
        for child in module.modules():
            own = child.__dict__
            self.own.append(own)
            self.sizes.append(len(own))
            if "forward" in own:
                self._place(own, "forward")
            if "_forward_hooks" in own:  # a lean module gets tables by its first hook
                self.hooks += [child._forward_pre_hooks, child._forward_hooks]
            if type(child) not in SETTLED:
                self._place(own, "training")
                if "p" in own:
                    self._place(own, "p")
            for held in (child._parameters, child._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        self._note(held, key)

    def _place(self, place: dict[str, Any], key: str) -> None:
        self.places.append((place.get, key))
        self.found.append(place.get(key))

    def _note(self, place: Any, key: str) -> None:
        if key == "weight":
            self.tables.append(place)
            self.weights.append(place[key])
        else:
            self._place(place, key)
        tensor = place[key]
        self.tensors.append(tensor)
        self.memory.append(tensor.detach())
        self.addresses.append(tensor.data_ptr())

    @property
    def possible(self) -> bool:
        """Whether writes to the tensors are counted."""
        return all(type(t) in HELD and not (t.is_inference() or lies_shared(t)) for t in self.tensors)

    def same(self) -> bool:
        """Whether nothing was replaced, moved or hooked, whatever the numbers."""
        try:
            return (
                self.written == Adapter.written
                and list(chain.from_iterable(self.keyed)) == self.keys
                and list(chain.from_iterable(map(_values, self.homes))) == self.modules  # equal to themselves alone
                and list(map(len, self.own)) == self.sizes
                and all(map(is_, map(_weight, self.tables), self.weights))
                and all(map(is_, [get(key) for get, key in self.places], self.found))
                and not any(self.hooks)
                and list(map(_address, self.tensors)) == self.addresses
            )
        except KeyError:  # a weight is gone
            return False

    def note(self) -> None:
        """The numbers are what they are now."""
        self.versions, self.steps = list(map(_version, self.tensors)), STEPS.taken

    def unwritten(self) -> bool:
        """Whether the tensors have not been written since."""
        noted = self.versions is not None and self.steps == STEPS.taken
        return noted and list(map(_version, self.tensors)) == self.versions


class Ledger(WeakKeyDictionary[Any, Any]):
    """What the layers of a model keep for forwards to come: layer -> something with a `watch` of its own.

    One look, when a forward begins, tells which of it still holds; a layer that runs again has another one taken.
    What is written to adapters in the middle of a forward is therefore seen by the next one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._all: dict[int, Any] | None = None
        self._watch = Watch()
        self.ready: dict[int, Any] = {}
        self.numbers = False  # whether what is ready was looked at for its numbers, too

    def __setitem__(self, layer: Any, kept: Any) -> None:
        self._all = None
        super().__setitem__(layer, kept)

    def __delitem__(self, layer: Any) -> None:
        self._all = None
        super().__delitem__(layer)

    def begin(self) -> None:
        """A forward begins, or has ended."""
        self.ready = {}

    def take(self, layer: Any, numbers: bool) -> Any:
        """What a layer has kept, if it still holds, once in a forward; else None.

        Arguments:
            layer: which.
            numbers: whether the numbers must be the same; else only the tensors.
        """
        found = self.ready.pop(id(layer), None) if self.numbers or not numbers else None
        if found is None and layer in self:
            self._look(numbers)
            found = self.ready.pop(id(layer), None)
        # a layer that is gone may have had the same number, as copies for data parallelism are
        return found if found is None or found.watch.keyed[0] is layer._modules else None

    def give_back(self, layer: Any, kept: Any) -> None:
        """It was not used, or has just been made of numbers that are there."""
        if not self.numbers:
            self.ready, self.numbers = {}, True
        self.ready[id(layer)] = kept

    def _look(self, numbers: bool) -> None:
        if self._all is None or len(self._all) != len(self):
            self._gather()
        if not (self._watch.same() and (not numbers or self._watch.unwritten())):
            for layer, kept in list(self.items()):
                if not (kept.watch.same() and (not numbers or kept.watch.unwritten())):
                    del self[layer]
            self._gather()
        self.ready, self.numbers = dict(self._all or ()), numbers

    def _gather(self) -> None:
        held = list(self.items())
        self._watch = Watch.over([kept.watch for _, kept in held])
        self._all = {id(layer): kept for layer, kept in held}
