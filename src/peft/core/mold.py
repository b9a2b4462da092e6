"""Layers and adapters like one that has been made in full: the same modules with tensors of their own, and no more.

A model has few forms of layers and many layers of each. What an adapter consists of is worked out once for a form; the
next layer of that form gets copies. Where anything is out of the ordinary there is no mold, and every layer is made in
full.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import views
from .gated import GRAPH
from .host import changed
from .layer import BaseTunerLayer
from .lean import NO_BUFFERS, TABLES
from .pattern import settings, tables
from .plan import Target
from .sharded import is_mesh
from .stack import Adapter
from .tie import inside

_NOTHING: dict[str, Any] = {}  # what a new adapter has under compile; replaced when the layer first runs
_LAYER = {"training", "_parameters", "_buffers", "_modules", "view", "call", "adapters", "_plain"}
# what decides nothing of what an adapter is made of
_STATE = {"_names", "_off", "_run", "_by_task", "_by_input", *GRAPH}
OWN = {"layer", "path", "cache", "direct", "plan", "twin"}  # what no other adapter has
_SHAPES = ("in_features", "out_features")
_part = torch.Tensor._make_subclass
_new = object.__new__


def form_of(base: nn.Module) -> Hashable:
    """Equal for modules on which an adapter of the same settings has the same tensors; None where that is not known."""
    d = base.__dict__
    weight = d["_parameters"].get("weight")
    if type(base) not in views.PLAIN or type(weight) is not nn.Parameter or "_hf_hook" in d or "compute_dtype" in d:
        return None
    return type(base), d["in_features"], d["out_features"], weight.shape, weight.dtype, weight.device


class Filling(NamedTuple):
    """Another adapter than that of a mold: its name, settings and shared tensors, its own in turn, and `training`."""

    name: str
    settings: Any
    shared: dict[str, Any]
    weights: Iterator[Tensor]
    training: bool


class Mold:
    """What makes further layers and adapters like those of one layer.

    Arguments:
        layer: the layer.
        name: its adapter, just made.
        start: gives first values to tensors, by key; None where they have none (meta device).
    """

    def __init__(self, layer: BaseTunerLayer, name: str, start: Callable[[dict[str, Tensor]], None] | None):
        p = layer.adapters[name]
        self.kind, self.name, self.method, self.start = type(layer), name, p.method, start
        self.view, self.call, self.plain = layer.view, layer.call, layer._plain
        # what an active adapter notes of its own layer is no part of others
        self.values = [(k, None if k == "hot" else v) for k, v in p.__dict__.items() if k not in OWN]
        self.idle = p.idle
        self.parts: list[Any] = []  # the modules: of a dropout its arguments, of a matrix its sizes too
        for key, home in layer._modules.items():
            if key != "base_layer" and name in home:  # type: ignore[operator]
                module: Any = home._modules[name]  # type: ignore[union-attr]
                if type(module) is nn.Dropout:
                    self.parts.append((key, [("p", module.p), ("inplace", module.inplace)], None, None, None))
                    continue
                weight: Any = module._parameters["weight"]
                sizes = [(k, module.__dict__[k]) for k in _SHAPES]
                self.parts.append((key, sizes, weight.shape, weight.dtype, weight.device))
        self.tensors: list[Any] = [(key, shape, dtype) for key, _, shape, dtype, _ in self.parts if shape is not None]
        held = self.tensors if start is None else []
        self.empty = [(key, torch.empty(shape, dtype=dtype, device="meta")) for key, shape, dtype in held]

    @classmethod
    def of(cls, layer: BaseTunerLayer, name: str, meta: bool) -> Mold | None:
        """The mold of a layer, if all that it consists of is known."""
        p, base = layer.adapters[name], layer._modules["base_layer"]
        start = p.method.again(p) if layer.begins_alike() else None
        ordinary = layer.__dict__.keys() <= _LAYER | _STATE and type(layer.view) is views.LinearView and not layer._read
        if not ordinary or base is None or p.shared or p.cache or layer.packed is not None or start is None:
            return None
        homes = [h for k, h in layer._modules.items() if k != "base_layer" and name in h]  # type: ignore[operator]
        known = all(type(h) is views.ModuleDict and _simple(h._modules[name]) for h in homes)
        return cls(layer, name, None if meta else start) if known and not is_mesh(base._parameters["weight"]) else None

    def fits(self, layer: BaseTunerLayer) -> bool:
        """Whether the adapter can be added to a layer that stands there already."""
        modules = layer._modules
        homes = [modules[key] for key, *_ in self.parts if key in modules]
        if len(homes) < len(self.parts) and any(p.idle for p in layer.adapters.values()):
            return False  # a new home may have to hold what others do without
        alike = type(layer) is self.kind and layer.parameter_name is None and layer.call is self.call
        return alike and not any(k in modules for k in self.idle) and all(type(h) is views.ModuleDict for h in homes)

    def layer(self, base: nn.Module) -> BaseTunerLayer:
        """A layer around a module of the form, without adapters."""
        layer: BaseTunerLayer = _new(self.kind)
        d = layer.__dict__
        d["training"], d["_parameters"], d["_buffers"] = base.training, {}, NO_BUFFERS
        d["_modules"], d["view"], d["call"], d["adapters"] = {"base_layer": base}, self.view, self.call, {}
        d["_plain"] = self.plain
        return layer

    def add(self, layer: BaseTunerLayer, path: str, tables: list[dict[str, Any]]) -> None:
        """The adapter, frozen, in a layer of the form; `tables` receives what holds its parameters."""
        if self.start is None:  # without memory one stands for all
            empty = self.empty
        else:
            parts = [part for part in self.parts if part[2] is not None]
            empty = [(key, torch.empty(shape, dtype=dtype, device=device)) for key, _, shape, dtype, device in parts]
        made: dict[str, Tensor] = {key: _part(nn.Parameter, tensor, False) for key, tensor in empty}
        self._put(layer, path, tables, self.name, iter(made.values()), layer.__dict__["training"])
        if self.start is not None:
            self.start(made)

    def fill(self, layer: BaseTunerLayer, path: str, tables: list[dict[str, Any]], filling: Filling) -> None:
        """Another adapter, which has its parameters already; as `add`."""
        d = self._put(layer, path, tables, filling.name, filling.weights, filling.training).__dict__
        d["name"], d["settings"], d["shared"] = filling.name, filling.settings, filling.shared

    def _put(
        self,
        layer: BaseTunerLayer,
        path: str,
        tables: list[dict[str, Any]],
        name: str,
        weights: Iterator[Tensor],
        training: bool,
    ) -> Adapter:
        own = layer.__dict__
        modules = own["_modules"]
        for key, sizes, shape, *_ in self.parts:
            home = modules.get(key)
            if home is None:
                home = modules[key] = _bare(views.ModuleDict, training)
            if shape is None:
                home.__dict__["_modules"][name] = nn.Dropout(**dict(sizes)).train(training)
                continue
            part = home.__dict__["_modules"][name] = _new(views.Linear)
            d, table = part.__dict__, {"weight": next(weights), "bias": None}
            d["training"], d["_parameters"], d["_buffers"], d["_modules"] = training, table, NO_BUFFERS, {}
            (k1, v1), (k2, v2) = sizes
            d[k1], d[k2] = v1, v2
            tables.append(table)
        p: Adapter = _new(Adapter)
        d = p.__dict__
        d["layer"], d["path"], d["cache"], d["direct"], d["plan"] = layer, path, {}, _NOTHING, None
        d.update(self.values)
        own["adapters"][name] = p
        if own["_plain"] is not self.plain:
            own["_plain"] = own["_plain"] | self.plain
        return p


class Cast(NamedTuple):
    """What an adapter is in one layer: around which module, of what form that is, and the mold of the adapter."""

    layer: BaseTunerLayer
    path: str
    base: nn.Module
    form: Any
    mold: Mold


_told: ContextVar[list[Cast] | None] = ContextVar("casts", default=None)


@contextmanager
def casts_told() -> Iterator[list[Cast]]:
    """While open, an adapter tells its layers, if the modules that it adapts are all of forms that have a mold."""
    found: list[Cast] = []
    token = _told.set(found)
    try:
        yield found
    finally:
        _told.reset(token)


class Casting:
    """The part of an injection that makes layers which are like others."""

    tuner: Any
    name: str
    meta: bool
    undo: list[Callable[[], Any]]
    places: dict[int, Any]
    model: nn.Module
    placed: list[BaseTunerLayer]
    full: list[BaseTunerLayer]
    tables: list[dict[str, Any]]  # that hold the parameters of casts

    def _like_others(self, targets: list[Target]) -> Iterator[Target]:
        """Cast what is like a layer that has been made; give back the other targets, one by one, to be made in full.

        Where a program stands in for the making of layers it is asked for all of them.
        """
        kind, config = type(self.tuner), self.tuner.peft_config[self.name]
        molds: dict[Hashable, Mold | None] = {}
        if kind._create_and_replace is not kind.own_step or "_create_and_replace" in self.tuner.__dict__:
            yield from targets
            return
        parents: dict[str, nn.Module] = {}
        fresh: list[BaseTunerLayer] = []
        added: list[BaseTunerLayer] = []
        told, casts = _told.get(), []
        self.undo.append(partial(self._taken_out, fresh, added))
        patterns, custom = bool(tables(config)), getattr(config, "_custom_modules", None) or kind.makes_layers()
        with torch.no_grad():
            for target in targets:
                found, path = target.module, target.path
                layer = found if isinstance(found, BaseTunerLayer) else None
                base = found if layer is None else layer._modules["base_layer"]
                form = form_of(base) if path and id(found) not in self.places and not custom else None  # type: ignore[arg-type]
                key = (form, id(settings(config, path)) if patterns else 0)
                mold = None if form is None else molds.get(key)
                if mold is None or not self._cast(mold, target, layer, parents, fresh, added):
                    before, mold = len(self.full), None
                    yield target
                    if form is not None and key not in molds and len(self.full) == before + 1:
                        mold = molds[key] = Mold.of(self.full[-1], self.name, self.meta)
                if mold is not None and told is not None:  # else for nothing, and the memory would stay taken
                    casts.append(Cast(self.placed[-1], path, base, form, mold))  # type: ignore[arg-type]
        if told is not None and len(casts) == len(targets):
            told[:] = casts

    def _cast(
        self, mold: Mold, target: Target, layer: Any, parents: dict[str, nn.Module], fresh: list[Any], added: list[Any]
    ) -> bool:
        """One target; False where it must be made in full after all."""
        if layer is None:
            up, _, leaf = target.path.rpartition(".")
            parent = parents.get(up)
            if parent is None:
                parent = self._at(up)
                if views.reads_weights(parent):
                    return False
                parents[up] = parent
            layer = mold.layer(target.module)
            mold.add(layer, target.path, self.tables)
            fresh.append(layer)
            parent.__dict__["_modules"][leaf] = layer
        elif mold.fits(layer):
            added.append(layer)
            mold.add(layer, target.path, self.tables)
        else:
            return False
        self.placed.append(layer)
        return True

    def _at(self, path: str) -> nn.Module:
        module = inside(self.model)
        for name in path.split(".") if path else ():
            module = inside(module._modules[name])
        return module

    def _taken_out(self, fresh: list[BaseTunerLayer], added: list[BaseTunerLayer]) -> None:
        for layer in fresh:
            up, _, leaf = layer.adapters[self.name].path.rpartition(".")
            self._at(up)._modules[leaf] = layer._modules["base_layer"]
        for layer in added:
            layer._drop(self.name)
            layer._replan()
        changed()


def _bare(kind: type[nn.Module], training: bool) -> Any:
    module = _new(kind)
    d = module.__dict__
    d["training"], d["_parameters"], d["_buffers"], d["_modules"] = training, {}, NO_BUFFERS, {}
    return module


def _simple(m: Any) -> bool:
    """Whether a module is a matrix and nothing else, or dropout."""
    if type(m) is nn.Dropout:
        return all(not m.__dict__[table] for table in TABLES)
    return type(m) is views.Linear and m._parameters.keys() == {"weight", "bias"} and m._parameters["bias"] is None
