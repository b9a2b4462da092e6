"""What is written: for each file the tensors, in order, and which of them are computed anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .names import Group, Names
from .outcome import Outcome, Value
from .shards import CheckpointError, Place, Shards, Stored
from .skeleton import held, named_tensors


@dataclass
class FilePlan:
    """One file of the merged checkpoint.

    Arguments:
        name: of the file, here and in the base.
        places: its tensors, in the order of their numbers.
        copied: those that are as in the base.
        groups: those that are computed from the base's, with the files' other tensors of their groups.
        added: those that the base's files do not hold.
    """

    name: str
    places: list[Place]
    copied: list[Stored] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    added: list[tuple[str, Value]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(place.size for place in self.places)


class Plan:
    """The files of the merged checkpoint: the base's, with the same keys, and what the merge has untied or added.

    Arguments:
        shards: the base's files, with all layers of the merged model.
        names: of its tensors.
        outcome: the merged model.
        changes: what config.json says otherwise of repeated layers.
    """

    def __init__(self, shards: Shards, names: Names, outcome: Outcome, changes: dict[str, Any]):
        self.shards, self.names, self.outcome, self.changes = shards, names, outcome, changes
        self.changed = [group for group in names.groups if self._changes(group)]
        self.added = self._added()
        of_key = {key: group for group in self.changed for key in group.keys}
        for group in self.changed:
            self._check(group)
        self.files = [self._file(name, shards.files[name].tensors, of_key) for name in shards.files]
        by_name = {file.name: file for file in self.files}
        for key, value, place in self.added:
            file = by_name[self._home(value) or self.files[-1].name]
            file.added.append((key, value))
            file.places.append(place)
        for file in self.files:
            if file.added:  # numbers lie at addresses that fit their size: widest first
                file.places.sort(key=lambda p: -p.dtype.itemsize)

    def _changes(self, group: Group) -> bool:
        return any(self.outcome.values[n].changed for n in group.names if n in self.outcome.values)

    def _check(self, group: Group) -> None:
        for name in group.names:
            value = self.outcome.values.get(name)
            if value is not None and (value.work or value.own is None):
                self._source(value)
        self.names.check_way_back(group)

    def _source(self, value: Value) -> Group:
        known = [n for n in value.names if n in self.names.group_of]
        return self.names.numbers((known or value.names)[0])

    def _file(self, name: str, tensors: list[Stored], of_key: dict[str, Group]) -> FilePlan:
        plan = FilePlan(name, [Place(s.key, s.dtype, s.shape) for s in tensors])
        for stored in tensors:
            group = of_key.get(stored.key)
            if group is None:
                plan.copied.append(stored)
            elif group not in plan.groups:
                plan.groups.append(group)
        return plan

    def _added(self) -> list[tuple[str, Value, Place]]:
        """Tensors of the merged model that the base's files hold under no name of theirs."""
        found: list[tuple[str, Value, Place]] = []
        places = named_tensors(self.outcome.model)
        covered = {id(held(*places[name])) for name in self.names.group_of if name in places}
        for name, (module, attr) in places.items():
            tensor: Tensor = held(module, attr)
            value = self.outcome.values[name]
            if id(tensor) in covered or not (value.changed or self._split(name, value)):
                continue
            covered.add(id(tensor))
            if value.work or value.own is None:
                self._source(value)
            place = Place(self.names.new_key(name), tensor.dtype, tuple(tensor.shape))
            if place.key in self.names.tensors:
                raise CheckpointError(
                    f"The merged model has a tensor {name!r}, but the base's {place.key!r} is another."
                )
            found.append((place.key, value, place))
        return found

    def told(self, base: Shards) -> tuple[list[str], list[str]]:
        """Keys of the tensors that differ from those of the base's files, and keys that these have not."""
        keys = [key for group in self.changed for key in group.keys]
        here = {s.key: (s.file, s.start) for s in base.tensors.values()}
        moved = [k for k, s in self.shards.tensors.items() if here.get(k) != (s.file, s.start)]
        keys = [k for k in dict.fromkeys([*keys, *moved]) if k in here]
        return keys, [k for k in moved if k not in here] + [key for key, *_ in self.added]

    def _split(self, name: str, value: Value) -> bool:
        """Whether a tensor that was tied to one in the files is so no longer."""
        return name in value.names and any(n in self.names.group_of for n in value.names)

    def _home(self, value: Value) -> str | None:
        """The file that holds what a value starts from."""
        known = [n for n in value.names if n in self.names.group_of]
        return self.names.tensors[self.names.group_of[known[0]].keys[0]].file.name if known else None


def settings(plan: Plan, stated: dict[str, Any]) -> dict[str, Any]:
    """config.json of the merged model: the base's (`stated`), with what the merge has changed."""
    outcome, added = plan.outcome, bool(plan.added)
    new = {**stated, **plan.changes} if stated else {}
    config: Any = getattr(outcome.model, "config", None)
    if stated and getattr(config, "tie_word_embeddings", True) is False and stated.get("tie_word_embeddings", True):
        new["tie_word_embeddings"] = False
    kind = type(outcome.model).__name__
    labels = getattr(config, "num_labels", None)
    if stated and added and kind not in (stated.get("architectures") or [kind]):
        new["architectures"] = [kind]
        if labels is not None and labels != 2:
            new["id2label"], new["label2id"] = config.id2label, config.label2id
    return new
