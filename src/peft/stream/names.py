"""Which tensors of the files make which tensors of the model, and back: renamed, stacked, put together or cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import listing
from .shards import CheckpointError, Stored
from .skeleton import held, named_tensors, renamed

DENSE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Group:
    """Tensors of the files that make tensors of the model together; one of each where nothing is converted.

    `converter` is transformers' for the group, and `patterns` says in which part of it each key is.
    """

    keys: list[str]
    names: list[str]
    converter: Any = None
    patterns: list[str] = field(default_factory=list)


class Names:
    """The correspondence of a checkpoint's keys and a model's names, found from headers alone.

    The model's tensors get the dtypes of the files. Raises CheckpointError if shapes differ: it is another base then.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Stored]):
        self.model, self.tensors = model, tensors
        self.places = named_tensors(model)
        found = _by_transformers(model, tensors) if hasattr(model, "base_model_prefix") else None
        self.groups = self._plain() if found is None else found
        self.group_of: dict[str, Group] = {}
        self._part()
        wrong = [line for group in self.groups for line in self._take(group)]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} tensors of the checkpoint have other shapes than config.json (or the model) says:\n"
                + "\n".join(wrong[:20])
                + "\nIt is not the base that they describe. Nothing was written."
            )

    def _part(self) -> None:
        """Give tensors that are tied in the model, but differ in the files, places of their own."""
        tied: dict[int, list[Stored]] = {}
        for group in self.groups:
            if group.converter is not None:
                continue
            module, attr = self.places[group.names[0]]
            stored, known = self.tensors[group.keys[0]], tied.setdefault(id(held(module, attr)), [])
            if known and not known[0].same(stored):
                if not hasattr(self.model, "base_model_prefix"):
                    raise CheckpointError(
                        f"{known[0].key!r} and {stored.key!r} are tied in the model, but differ here."
                    )
                tensor = held(module, attr)
                module._parameters[attr] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
            else:
                known.append(stored)

    def forward(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors of the model that a group makes, by name.

        Arguments:
            group: the group.
            read: gives a tensor of the files by its key.
        """
        if group.converter is None:
            return {group.names[0]: read(group.keys[0])}
        converter, first = copy.deepcopy(group.converter), group.names[0]
        for key, pattern in zip(group.keys, group.patterns, strict=True):
            converter.add_tensor(first, key, pattern, partial(read, key))
        made = converter.convert(first, model=self.model, config=self.model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def backward(self, group: Group, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the files, by key, from those of the model."""
        if group.converter is None:
            return {group.keys[0]: made[group.names[0]]}
        return dict(self._reverted(made))

    def new_key(self, name: str) -> str:
        """The key in files of a tensor that the files did not hold."""
        hollow = torch.empty(held(*self.places[name]).shape, dtype=torch.float32, device="meta")
        found = self._reverted({name: hollow})
        return next(iter(found)) if len(found) == 1 else name

    def _reverted(self, made: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not hasattr(self.model, "_weight_conversions"):
            return made
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, dict(made))

    def _plain(self) -> list[Group]:
        names = set(self.places)
        pairs = [(key, renamed(self.tensors, names, key)) for key in self.tensors]
        groups = [Group([key], [name]) for key, name in pairs if name is not None]
        twice = _twice(group.names[0] for group in groups)
        return [group for group in groups if group.names[0] not in twice or group.keys == group.names]

    def _take(self, group: Group) -> list[str]:
        """File a group; lines about what is wrong with it."""
        kinds = {self.tensors[key].dtype for key in group.keys}
        if len(kinds) > 1:
            group.names = group.names if group.converter is None else []
            return []  # left as it is; whoever needs its numbers is told
        made = self.forward(group, lambda key: self.tensors[key].empty())
        group.names = [name for name in made if name in self.places]
        wrong = []
        for name in group.names:
            here, new = held(*self.places[name]), made[name]
            if here.shape != new.shape:
                wrong.append(f"  {group.keys[0]}: {tuple(new.shape)} in the files, {tuple(here.shape)} in the model")
            elif new.dtype in DENSE:
                here.data = here.data.to(new.dtype)
            self.group_of[name] = group
        return wrong

    def numbers(self, name: str) -> Group:
        """The group that makes a tensor whose numbers are needed.

        Raises CheckpointError if the files lack it, or hold it in a form that is not computed with.
        """
        group = self.group_of.get(name)
        if group is None:
            raise CheckpointError(
                f"The adapter changes {name!r}, but the checkpoint holds no such tensor, or in a form that is not "
                "known here. Check that it is the adapter's base."
            )
        packed = [k for k in group.keys if self.tensors[k].dtype not in DENSE]
        if packed:
            kind = self.tensors[packed[0]].dtype
            raise CheckpointError(
                f"The adapter changes {name!r}, which is stored as {kind} ({packed[0]!r}). Merging needs float64, "
                "float32, float16 or bfloat16: use a checkpoint that is not quantised."
            )
        return group

    def check_way_back(self, group: Group) -> None:
        """Raise CheckpointError unless the model's tensors can be put into the files' form again."""
        if group.converter is None:
            return
        empty = self.forward(group, lambda key: self.tensors[key].empty())
        back = self.backward(group, empty)
        if {k: tuple(t.shape) for k, t in back.items()} != {k: self.tensors[k].shape for k in group.keys}:
            raise CheckpointError(
                f"{listing(group.names)} are converted from {len(group.keys)} tensors of the files such as "
                f"{group.keys[0]!r}, and transformers does not know the way back. Load the model and merge in memory."
            )


def _twice(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]


def _by_transformers(model: Any, tensors: Mapping[str, Stored]) -> list[Group] | None:
    """Groups as `from_pretrained` makes them; None for a transformers that does not say how it does."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        return None
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Group] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue
        group = groups.get(name)
        if group is None:
            group = groups[name] = Group([], [name], None if pattern is None else by_pattern[pattern])
        elif pattern is None:
            raise CheckpointError(f"The checkpoint holds {name!r} twice, as {group.keys[0]!r} and {key!r}.")
        group.keys.append(key)
        group.patterns.append(pattern or key)
    model._weight_conversions = [m for m in mapping if m.was_used()]
    return list(groups.values())
