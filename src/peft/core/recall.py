"""How an adapter was placed and filled from its file, remembered for the next one that is like it.

Servers load many adapters of one configuration into one model. Where an adapter's tensors go, and of which form its
layers are, is worked out for the first of them by the ordinary way, which says all that there is to say. A recipe is
kept only of a load that said nothing, went to every place and took every tensor as it was; and it serves only a file
with the same configuration and the same tensors, while the model is as it was. Anything else goes the ordinary way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain, repeat
from operator import attrgetter, contains, is_
from typing import Any

from torch import Tensor, nn

from . import sharded
from .base_state import WRAPPERS
from .digests import NUMBERS
from .entries import Entry
from .fingerprint import HASH, SHAPES
from .header import Header
from .host import AdapterHost, below, changed, changes, standing
from .layer import BaseTunerLayer
from .method import Method
from .mold import Cast, Filling, Mold, form_of
from .pattern import settings, tables
from .pour import Pouring, parameters
from .tuner import BaseTuner

Key = tuple[dict[str, Any], bool, list[tuple[str, ...]]]
_STEPS = (
    "inject_adapter",
    "_create_and_replace",
    "_create_new_module",
    "_inject_parameters",
    "before_layers",
    "after_layers",
    "match",
)
_steps = attrgetter(*_STEPS, "plan_of.__func__", "injection")
# What is looked at in many objects at once, without a step of Python's for each.
_modules, _parameters, _training = attrgetter("_modules"), attrgetter("_parameters"), attrgetter("training")
_shape = attrgetter("shape")
_form, _sizes, _adapters = (
    attrgetter("shape", "dtype", "device"),
    attrgetter("in_features", "out_features"),
    attrgetter("adapters"),
)
_kept_by = attrgetter("call", "parameter_name")
# Fields in which the files of like adapters differ.
_OF_NO_ACCOUNT = frozenset(["auto_mapping", "base_model_name_or_path", "peft_version", "revision", "origin"])
MOST = 4  # recipes that a tuner keeps
_PLAIN = frozenset([bool, int, float, str, type(None)])
_OWN = frozenset(["name", "method", "settings", "shared"])  # of an adapter's values
# What a configuration must leave out: what adapts more than the layers, or has been written into it on the way.
_MORE = (
    *("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication", "ensure_weight_tying"),
    *("fan_in_fan_out", "alora_invocation_tokens", "_custom_modules"),
)


class Standing:
    """A model's modules and the shapes of its parameters, to see whether it is still the same model.

    Arguments:
        model: the model with its layers; the modules of adapters do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules, again = below(model)
        self.hosts = standing(self.modules)
        kinds = {kind for kind in set(map(type, self.modules)) if issubclass(kind, AdapterHost)}
        usual = [m for m in self.modules if type(m) not in kinds]
        inner, self._owners = [m for m in usual if m._modules], [m for m in usual if m._parameters]
        self._children = [(m, dict(m._modules)) for m in inner]
        self._bases, self._owned = self._standing(), self._parameters()
        held = [p for p in self._owned[0] if p is not None]
        tied = again or len({*map(Tensor.data_ptr, held)}) < len(held)
        wrapped = any(not WRAPPERS.isdisjoint(kids) for _, kids in self._children)
        told = [p for p in held if type(p) is not nn.Parameter or p.__dict__]
        self.plain = not (tied or wrapped or any(map(sharded.is_spread, told)))
        self._inner = [*inner, *self.hosts]
        layers = {kind for kind in kinds if issubclass(kind, BaseTunerLayer)}
        self._layers = [m for m in self.hosts if type(m) in layers]
        self._others = [m for m in self.hosts if type(m) not in layers]
        self.layered = not self._others
        self._seen: tuple[list[Any], list[Any]] | None = None

    def has(self, name: str) -> bool:
        """Whether a layer or wrapper has an adapter of that name."""
        here = any(map(contains, map(_adapters, self._layers), repeat(name)))
        return here or any(name in host._get_available_adapters() for host in self._others)

    def unchanged(self, bases: list[nn.Module]) -> bool:
        """Whether nothing at all is another than when `note` was called; `bases` are the layers' modules."""
        if self._seen is None:
            return False
        (facts, things), now = self._seen, self._now(bases)
        return now[0] == facts and len(now[1]) == len(things) and all(map(is_, now[1], things))

    def note(self, bases: list[nn.Module]) -> None:
        """All has been found to be in order."""
        self._seen = self._now(bases)

    def _now(self, bases: list[nn.Module]) -> tuple[list[Any], list[Any]]:
        """What `holds`, `form_of` and `Mold.fits` look at: what is compared, and what must be the same objects."""
        tables, owned = [*map(_modules, self._inner)], [*map(_parameters, self._owners)]
        children = [*chain.from_iterable(map(dict.values, tables))]
        held, own = [*chain.from_iterable(map(dict.values, owned))], [*map(vars, bases)]
        facts = [
            *map(len, tables),
            *map(len, owned),
            *chain.from_iterable(tables),
            *chain.from_iterable(owned),
            *map(type, children),
            *map(type, held),
            *map(_form, [p for p in held if p is not None]),
            *map(_sizes, bases),
            *map(contains, own, repeat("_hf_hook")),
            *map(contains, own, repeat("compute_dtype")),
            *map(_kept_by, self._layers),
        ]
        return facts, children + held

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        (held, facts), (before, known) = self._parameters(), self._owned
        return (
            all(m._modules == kids for m, kids in self._children)
            and all(map(is_, self._standing(), self._bases))
            and facts == known
            and all(map(is_, held, before))
        )

    def _standing(self) -> list[Any]:
        """What stands below the layers and wrappers."""
        return [m._modules[k] for m in self.hosts for k in m._below]

    def _parameters(self) -> tuple[list[Any], list[Any]]:
        """The parameters of the model's own modules; how many each has, their names and shapes."""
        tables = [*map(_parameters, self._owners)]
        held = [*chain.from_iterable(map(dict.values, tables))]
        shapes = map(_shape, [p for p in held if p is not None])
        return held, [*map(len, tables), *chain.from_iterable(tables), *shapes]


class Recipe:
    """How the adapters of one configuration and one layout of their file are made in one model.

    Arguments:
        key: what they have in common.
        header: of the first one's file.
        pouring: what is to be done in each layer.
        standing: the model.
        stored: what placing the first has written into its configuration.
    """

    def __init__(self, key: Key, header: Header, pouring: Pouring, standing: Standing, stored: dict[str, Any]):
        self.key, self.layout, self.standing = key, header.tensors, standing
        self.jobs, self._keys, self._kinds = pouring
        self.base, self.stored = base_of(header), stored
        self._bases = [job.base for job in self.jobs]
        self._told = [job for job in self.jobs if job.mold.method.written.__func__ is not Method.written]

    def fits(self, key: Key, header: Header, name: str) -> bool:
        """Whether the next adapter is like the first, and the model as it was."""
        return (
            self.layout is header.tensors
            and self.key == key
            and not self.standing.has(name)
            and (self.standing.unchanged(self._bases) or self._looked_at())
        )

    def _looked_at(self) -> bool:
        """What `fits` asks of the model, one by one: something has changed, perhaps nothing that counts."""
        fits = self.standing.holds() and all(form_of(j.base) == j.form and j.mold.fits(j.layer) for j in self.jobs)
        if fits:
            self.standing.note(self._bases)
        return fits

    def made(self, state: Mapping[str, Tensor]) -> list[nn.Parameter]:
        """The parameters of all layers, frozen, beside their base weights, of tensors that nobody else has."""
        return parameters([state[key] for key in self._keys], self._kinds)

    def evaluating(self) -> bool:
        """Whether the model is in evaluation, where none but adapters of layers are put into it one by one."""
        return not any(map(_training, self.standing.modules)) and self.standing.layered

    def take_out(self, name: str) -> None:
        """Undo `place`."""
        for job in self.jobs:
            job.layer._drop(name)

    def place(self, tuner: Any, name: str, config: Any, made: list[nn.Parameter], training: bool) -> None:
        """Put an adapter's parameters into the layers; the tuner knows its configuration already."""
        roster = tuner.__dict__.get("_roster")
        current = roster is not None and roster.current
        held: list[dict[str, Any]] = []
        alike, filling = not tables(config), Filling(name, config, {}, iter(made), training)
        for job in self.jobs:
            own = filling if alike else filling._replace(settings=settings(config, job.path))
            job.mold.fill(job.layer, job.path, held, own)
        changed()
        if current:
            roster.changes = changes()
            roster.told(name, held, ())
        for job in self._told:
            p = job.layer.adapters[name]
            with p.layer.readable():
                p.method.written(p)
        config.__dict__.update((k, copy.copy(v)) for k, v in self.stored.items())


def key_of(values: Mapping[str, Any], autocast: bool) -> Key:
    """What adapters must have in common for one recipe: the settings as they are read from the file, and the call's."""
    kept = {k: v for k, v in values.items() if k not in _OF_NO_ACCOUNT}
    return kept, autocast, [tuple(v) for v in kept.values() if type(v) is dict and v]  # of tables, the order counts


def base_of(header: Header) -> tuple[str | None, ...]:
    """What a file notes of its base model."""
    return header.metadata.get(HASH), header.metadata.get(SHAPES), header.metadata.get(NUMBERS)


def usual(tuner: Any, config: Any) -> bool:
    """Whether adapters are placed by nothing but the layers' own steps, for which no program stands in."""
    kind = tuner.kind_of(config) if isinstance(tuner, BaseTuner) else None
    if kind is None or not issubclass(kind, BaseTuner) or not tuner.__dict__.keys().isdisjoint((*_STEPS, "plan_of")):
        return False
    try:
        plain = _steps(kind) == _steps(type(tuner)) == _steps(BaseTuner)
    except AttributeError:  # of a `plan_of` that is no method of the class
        return False
    return plain and BaseTuner._create_and_replace is BaseTuner.own_step


def alone(tuner: Any, config: Any) -> bool:
    """Whether an adapter is placed by the layers' own steps, and has nothing beside the layers."""
    more = any(getattr(config, field, None) for field in _MORE) or getattr(config, "bias", "none") != "none"
    return not more and usual(tuner, config)


def recipe_of(
    tuner: Any,
    name: str,
    key: Key,
    header: Header,
    places: list[tuple[Entry, str]],
    pouring: Pouring | None,
) -> Recipe | None:
    """The recipe of an adapter that has just been filled, silently; None where something is out of the ordinary.

    Arguments:
        tuner: the tuner.
        name: the adapter.
        key: what the next adapter must have in common with it.
        header: of its file.
        places: where its tensors are, each with its key.
        pouring: what has been done for it in each layer; None where that is not known.
    """
    config = tuner.peft_config[name]
    if pouring is None and (not alone(tuner, config) or tuner.waiting or len(places) != len(header.tensors)):
        return None
    stored = {k: v for k, v in config.__dict__.items() if k in key[0] and v != key[0][k]}
    standing = Standing(tuner.model)
    if not standing.plain or not stored.keys() <= {"target_modules"}:
        return None
    pouring = _pouring(name, places, not tables(config)) if pouring is None else pouring
    if pouring is None or len(pouring.keys) != len(header.tensors):
        return None
    plain = all(map(_ordinary, {id(job.mold): job.mold for job in pouring.jobs}.values()))
    return Recipe(key, header, pouring, standing, stored) if plain else None


def _pouring(name: str, places: list[tuple[Entry, str]], alike: bool) -> Pouring | None:
    """What is to be done in each layer; None if one of them is out of the ordinary."""
    keys = {(id(entry.owner), entry.attr): (key, entry.tensor.dtype) for entry, key in places}
    layers = {id(entry.layer): entry.layer for entry, _ in places}
    molds: dict[Any, Mold | None] = {}
    found = Pouring([], [], [])
    for layer in layers.values():
        p = layer.adapters.get(name) if isinstance(layer, BaseTunerLayer) else None
        base = layer._modules.get("base_layer")
        form: Any = None if base is None else form_of(base)
        if not isinstance(layer, BaseTunerLayer) or p is None or base is None or form is None:
            return None
        like = form, 0 if alike else id(p.settings)
        if like not in molds:
            molds[like] = Mold.of(layer, name, meta=True)
        mold = molds[like]
        if mold is None or base._parameters["weight"].is_meta:  # type: ignore[union-attr]
            return None
        homes = [layer._modules[key] for key, *_ in mold.tensors]
        owners = [home._modules[name] for home in homes if home is not None]
        parts = [keys[id(owner), "weight"] for owner in owners if (id(owner), "weight") in keys]
        if len(parts) != len(homes):
            return None
        found.jobs.append(Cast(layer, p.path, base, form, mold))
        found.keys.extend(key for key, _ in parts)
        found.kinds.extend((dtype, form[-1]) for _, dtype in parts)
    return found


def _ordinary(mold: Mold) -> bool:
    """Whether an adapter's values are numbers and words, which the next may have too."""
    return all(
        k in _OWN or type(v) in _PLAIN or (type(v) is tuple and {*map(type, v)} <= _PLAIN) for k, v in mold.values
    )


class Recipes(list[Recipe]):
    """The recipes of a tuner; a copy of it has other modules, and none of these."""

    @classmethod
    def of(cls, tuner: nn.Module) -> Recipes:
        """Those of a tuner."""
        found = tuner.__dict__.get("_recipes")
        if found is None:
            found = tuner.__dict__["_recipes"] = cls()
        return found

    def note(self, recipe: Recipe) -> None:
        """Keep one more, and the last few of all."""
        self.append(recipe)
        del self[:-MOST]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
