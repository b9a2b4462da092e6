"""Putting an adapter's layers into a model: plan, place, freeze. Every step says how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..errors import PeftWarning, nearest, report
from ..kernels.modes import NARROW
from . import experts, handmade, storage, views
from .evaluation import learning
from .host import below, standing
from .layer import BaseTunerLayer, tuner_layers
from .method import Method, Site
from .mold import Casting
from .onload import device_of
from .replicate import check_repeated, replicate
from .roster import Roster
from .shared import SharedTensors, Sight, beside, is_late, shared_home, shared_of
from .stack import Adapter
from .targets import settings
from .tie import Place, among, innermost, places, tied_modules
from .tokens import TokenRows, TrainableTokensWrapper, check_same_tokens, check_untargeted
from .whole import Placing
from .wrappers import ModulesToSaveWrapper


@dataclass
class Injection(Casting, Placing):
    """One adapter on its way into a model.

    Arguments:
        tuner: the BaseTuner; `tuner.peft_config[name]` is the configuration.
        model: the user's model, which may itself be a target.
        name: the adapter's name.
        autocast: adapters beside half-precision weights are float32.
        meta: create the adapter's tensors on the meta device.
        undo: receives what takes each step back.
    """

    tuner: Any
    model: nn.Module
    name: str
    autocast: bool
    meta: bool
    undo: list[Callable[[], Any]]
    given: Any = None
    parameters: list[tuple[str, str]] = field(default_factory=list)  # the targets that come next, if they are such
    placed: list[BaseTunerLayer] = field(default_factory=list)
    full: list[BaseTunerLayer] = field(default_factory=list)  # those of them that are no casts
    tables: list[dict[str, Any]] = field(default_factory=list)
    shared: dict[str, SharedTensors] = field(default_factory=dict)
    places: dict[int, list[Place]] = field(default_factory=dict)  # of the modules that stand at several

    def __post_init__(self) -> None:
        self.kind = self.tuner.kind_of(self.config)
        self.whole = bool(getattr(self.config, "any_module", False))  # targets are modules of any class

    @property
    def config(self) -> Any:
        """The adapter's configuration, or the one that is given for a target."""
        return self.tuner.peft_config[self.name] if self.given is None else self.given

    def run(self, state_dict: Any = None) -> None:
        """Everything, in order; `state_dict`'s keys, if given, decide which modules are adapted."""
        config = self.config
        seen = below(self.model)
        held = standing(seen[0])
        first, off = not held, self._are_off(held)
        ranges = getattr(config, "layer_replication", None)
        if ranges and first:
            self.undo.append(replicate(self.model, ranges))
            seen = below(self.model)
        elif ranges:
            check_repeated(ranges, [c for n, c in self.tuner.peft_config.items() if n != self.name])
        self.places = places(self.model, seen)
        if state_dict is None:
            self.undo.append(experts.rewrite(config, self.model))
        plan = self.tuner.match(self.model, config, self.name, state_dict)
        if first:
            self.undo.append(self.tuner.call.forget)
            self._freeze(seen[0])
        self._share(plan)
        self._targets(plan)
        self._tied_adapters(plan)
        self.whole_modules(plan.modules_to_save or ())
        for path in plan.modules_to_tie:
            self._wrap_tied(path, plan.embedding)
        self._tokens(plan)
        for layer in self.full:
            layer.set_requires_grad(self.name, False)
        if off:  # new layers of a disabled model are so too
            for _, layer in tuner_layers(self.model):
                layer._set_disabled(True)
        if not getattr(config, "inference_mode", False):
            self.undo.append(learning(self.tuner, self.placed, self.name))
        self._biases()
        self._stored_layout()
        self._note(plan)
        alone = not (plan.modules_to_save or plan.modules_to_tie or getattr(config, "trainable_token_indices", None))
        if first and alone and not self.shared and not self.tuner.beside:
            known = Roster(self.tuner, self.placed)
            known.told(self.name, self.tables, self.full)
            self.tuner.__dict__["_roster"] = known

    def _are_off(self, held: list[Any]) -> bool:
        """Whether all that holds adapters runs without them; layers that have yet to follow a switch are not asked."""
        call = self.tuner.call
        if call.disabled is not None and all(isinstance(m, BaseTunerLayer) and m.call is call for m in held):
            return bool(held) and call.disabled
        return bool(held) and all(m.disable_adapters for m in held)

    def _share(self, plan: Any) -> None:
        """Make what all layers of the adapter share, and file it in the tuner."""
        known: Any = {k: next(iter(h._buffers.values())) for k, h in shared_of(self.tuner) if h._buffers}
        method = self.kind.method_of(self.config)
        if self.meta and is_late():
            from .late import Once, Waiting, waiting

            made = waiting(self.tuner, self.name, Waiting(method, self.config, Once(self._sights(plan)), known))
            self.undo.append(lambda: self.tuner.waiting.pop(self.name, None))
        else:
            made = method.shared_by(self.config, self._sights(plan))
        if not made:
            return
        sight = next(self._sights(plan))
        weight, own = sight.view.sample(sight.module), views.dtype_beside(sight.view, sight.module, self.autocast)
        place = _device(sight.module, weight)
        meta = self.meta or (weight.is_meta and place is None and torch.get_default_device().type == "meta")
        for key, new in beside(made, place, own if own in NARROW else None, known).items():
            home = shared_home(self.tuner, key, self.undo)
            self.undo.append(partial(home.delete_adapter, self.name))
            home.add(self.name, new, place, meta)
            self.shared[key] = home

    def _sights(self, plan: Any) -> Iterator[Sight]:
        for t in plan.targets:
            base = innermost(t.module)
            view = views.view_of(base, t.parameter, self.whole)
            for part in view.parts(base) or (t.parameter,):
                one = views.view_of(base, part, self.whole)
                yield Sight(".".join(filter(None, (t.path, part))), base, one, _existing(t.module, part))
            for name in view.read_children if t.parameter is None else ():
                child = innermost(base.get_submodule(name))
                yield Sight(f"{t.path}.{name}", child, views.view_of(child), _existing(base.get_submodule(name), None))

    # ---- targets -----------------------------------------------------------------------------------------------

    def _targets(self, plan: Any) -> None:
        """The layers of all targets, in order, by steps of the tuner that programs stand in for."""
        self.tuner.__dict__["under_way"] = self
        try:
            for of_parameters, group in groupby(plan.targets, lambda t: t.parameter is not None):
                targets = list(group)
                self.parameters = [(t.path, t.parameter) for t in targets] if of_parameters else []
                if of_parameters:
                    self.tuner._inject_parameters(self.config, self.model, self.name, self.meta)
                for target in () if of_parameters else self._like_others(targets):
                    parent, leaf, found = self.get(target.path)
                    self.tuner._create_and_replace(self.config, self.name, found, leaf, parent, target.path)
                    handmade.note(self, target.path)
        finally:
            del self.tuner.__dict__["under_way"]

    def target(self, config: Any, found: nn.Module, leaf: str, parent: Any, path: str, parameter: str | None) -> None:
        """The layer of one target as it is asked for: with other settings perhaps, or for a module inside it.

        Arguments:
            config: the settings.
            found: the module, which takes its place first if another stands there.
            leaf: its name in `parent`.
            parent: the module around it.
            path: of the target in the plan; where `leaf` and `parent` are others, the place is looked for.
            parameter: of the module, where that is the target.
        """
        if parameter is not None:
            path = path.removesuffix(parameter).removesuffix(".")
        if parent is not None and (leaf, parent) != (self.get(path)[1], self.get(path)[0]):
            around = next(name for name, module in self.model.named_modules() if module is parent)
            path = f"{around}.{leaf}" if around else leaf
        there = self.get(path)[2]
        if there is not found:
            self.put(parent, leaf, found, there)
        self.given = config
        try:
            if parameter is None and not handmade.is_programs_own(self, innermost(found)):
                self._module(path, innermost(found))
            else:
                self._place(path, parameter)
        finally:
            self.given = None

    def _place(
        self, path: str, parameter: str | None = None, method: Callable[[Any], Method] | None = None
    ) -> BaseTunerLayer:
        """The layer of one target, with the adapter's tensors in it."""
        parent, leaf, found = self.get(path)
        layer, fresh = _existing(found, parameter), False
        if layer is None and parameter is not None:
            parent, leaf, found = among(parent, leaf, found, parameter)
        if (own_kind := handmade.placed(self, path, parameter, layer)) is not None:
            return own_kind
        if layer is not None and self.whole != (layer.view.label == "Module"):
            raise ValueError(
                f"{path!r} is adapted by another method already. One of the two replaces the whole module: they cannot "
                "share it. Leave it out of one adapter's targets (`exclude_modules`)."
            )
        if layer is None:
            view = views.view_of(innermost(found), parameter, self.whole)
            layer = self._class(found, view)(found, self.tuner.call, parameter, views.reads_weights(parent))
            fresh = True
        full = f"{path}.{parameter}" if parameter else path
        own = settings(self.config, full)
        method_of = self.kind.method_of if method is None else method
        if not fresh:
            self.undo += [layer._replan, partial(layer._drop, self.name)]
        layer.add_adapter(self.name, method_of(own), self.site(layer, own, full), init=not self.meta)
        if fresh:
            self.put(parent, leaf, layer, found)
        self.placed.append(layer)
        self.full.append(layer)
        return layer

    def _class(self, found: nn.Module, view: Any) -> type[BaseTunerLayer]:
        """The class of a layer: after the storage of its weight, where the method has such a class, else its layout."""
        classes, kind = self.kind.layer_classes, storage.packed(innermost(found), view.name)
        named = classes.get(kind.label) if kind is not None and view.label == "Linear" else None
        return named or classes[view.label]

    def site(self, layer: BaseTunerLayer, own: Any, path: str) -> Site:
        """What the tensors of an adapter in this layer look like: beside the base weight, float32 beside half."""
        base = layer.get_base_layer()
        weight, dtype = layer.view.sample(base), views.dtype_beside(layer.view, base, self.autocast)
        place = _device(base, weight)
        device = torch.device("meta") if self.meta or place is None else place
        return Site(base, layer.view, own, path, dtype, device, self.shared, layer, place)

    def _module(self, path: str, base: nn.Module) -> None:
        """A target module: its matrix or matrices, and the child layers whose weights it reads."""
        view = views.view_of(base, None, self.whole)
        parts = view.parts(base)
        for parameter in parts or (None,):
            self._place(path, parameter)
        if view.read_children:
            below = [*path.split(".")] * bool(path) + ["base_layer"] * (self.get(path)[2].depth + 1)
            method = None if parts else self.kind.out_projection_method_of
            for child in view.read_children:
                self._place(".".join([*below, child]), None, method)

    def _tied_adapters(self, plan: Any) -> None:
        """Layers tied to the embedding take its tensors: as they are, or transposed by the method for another layout.

        Both are the same numbers in memory.
        """
        if not plan.target_modules_to_tie:
            return
        source = self.get(plan.embedding)[2]
        for path in plan.target_modules_to_tie:
            layer = self._place(path)
            mine = layer.adapters[self.name]
            if layer.view.label != source.view.label:
                mine.method.tie(mine, source.adapters[self.name])
                continue
            for own, other in zip(layer.slots(self.name), source.slots(self.name), strict=True):
                own.owner._parameters[own.attr] = other.owner._parameters[other.attr]

    # ---- tokens ------------------------------------------------------------------------------------------------

    def _tokens(self, plan: Any) -> None:
        """Wrap the embeddings that `trainable_token_indices` selects, and the layers tied to them."""
        wanted = getattr(self.config, "trainable_token_indices", None)
        if not wanted:
            return
        modules, others = self._named()
        if not isinstance(wanted, dict):
            wanted = {plan.embedding or "embed_tokens": wanted}
        chosen = {self._one(modules, others, suffix): list(indices) for suffix, indices in wanted.items()}
        tied = {path: tied_modules((path, self.get(path)[2]), modules) for path in chosen}
        if getattr(self.config, "ensure_weight_tying", False):
            check_same_tokens(chosen, tied)
        done: set[str] = set()
        for path, indices in chosen.items():
            if path in done:
                continue
            share = self._place_tokens(path, indices, None)
            done.add(path)
            for other in tied[path]:
                if chosen.get(other, indices) == indices and not isinstance(self.get(other)[2], ModulesToSaveWrapper):
                    self._place_tokens(other, indices, share)
                    done.add(other)

    def _one(self, modules: list[tuple[str, nn.Module]], others: dict[str, list[str]], suffix: str) -> str:
        """The one module that a name of `trainable_token_indices` means."""
        names = ((p, m, (p, *others.get(p, ()))) for p, m in modules)
        found = [(p, m) for p, m, called in names if any(f".{n}".endswith(f".{suffix}") for n in called)]
        if not found:
            leaves = {p.rpartition(".")[2] for p, _ in modules}
            raise ValueError(f"trainable_token_indices names {suffix!r}, which is no module.{nearest(suffix, leaves)}")
        path, module = found[0]
        saved = getattr(self.config, "modules_to_save", None) or ()
        if isinstance(module, ModulesToSaveWrapper) and any(path.endswith(e) for e in saved):
            text = f"{path!r} is named in trainable_token_indices and in modules_to_save. Choose one: "
            raise ValueError(f"{text}modules_to_save trains the whole module.")
        return path

    def _place_tokens(self, path: str, indices: list[int], share: Adapter | None) -> Adapter:
        parent, leaf, found = self.get(path)
        check_untargeted(path, found)
        if isinstance(found, TrainableTokensWrapper):
            wrapper = found
            self.undo.append(lambda: wrapper.token_adapter._drop(self.name))
        else:
            wrapper = TrainableTokensWrapper(found, self.name, self.tuner.call)
            self.put(parent, leaf, wrapper, found)
        layer = wrapper.token_adapter
        p = layer.add_adapter(self.name, TokenRows(indices, share), self.site(layer, None, path), init=not self.meta)
        if share is not None:
            layer.shares = layer.shares | {self.name}
        layer.set_requires_grad(self.name, False)
        return p

    # ---- the rest ----------------------------------------------------------------------------------------------

    def _biases(self) -> None:
        kind = getattr(self.config, "bias", "none")
        if kind == "none" or getattr(self.config, "inference_mode", False):
            return
        if kind == "all":
            copied = [m.original_module for _, m in tuner_layers(self.model) if isinstance(m, ModulesToSaveWrapper)]
            idle = {id(p) for m in copied for p in m.parameters()}  # their copies learn
            named = self.model.named_parameters()
            chosen: list[Any] = [p for n, p in named if n.rpartition(".")[2] == "bias" and id(p) not in idle]
        else:
            chosen = [b for layer in self.placed if (b := layer.get_base_layer()._parameters.get("bias")) is not None]
        before = [p.requires_grad for p in chosen]
        self.undo.append(lambda: [p.requires_grad_(f) for p, f in zip(chosen, before, strict=True)])
        for p in chosen:
            p.requires_grad_(True)

    def _stored_layout(self) -> None:
        """`fan_in_fan_out` as the layers have it: files say so, and other programs read them."""
        stated = getattr(self.config, "fan_in_fan_out", None)
        layers = [layer for layer in self.full if layer.view.label == "Linear"]
        found = {layer.view.out_axis(layer.get_base_layer()) == 1: type(layer.get_base_layer()) for layer in layers}
        if stated is None or not found or stated in found or not getattr(self.config, "corrected", True):
            return
        text = (
            f"fan_in_fan_out is set to {stated} but the target module is {found[not stated].__name__}. "
            f"Setting fan_in_fan_out to {not stated}."
        )
        report(PeftWarning, text, strict=False, stacklevel=7)
        config = self.config
        self.undo.append(lambda: setattr(config, "fan_in_fan_out", stated))
        config.fan_in_fan_out = not stated

    def _note(self, plan: Any) -> None:
        """What is stored once everything holds."""
        tuner, config = self.tuner, self.config
        for names, new in (
            (tuner.targeted_module_names, plan.module_names),
            (tuner.targeted_parameter_names, plan.parameter_names),
        ):
            known = set(names)
            names.extend(n for n in new if n not in known)
        if plan.target_modules is not None:
            config.target_modules = plan.target_modules
        if plan.modules_to_save is not None:
            config.modules_to_save = plan.modules_to_save
        if plan.target_modules_to_tie:
            config.target_modules_to_tie = plan.target_modules_to_tie
        if plan.modules_to_tie:
            config.modules_to_tie = plan.modules_to_tie


def _device(base: nn.Module, weight: torch.Tensor | None) -> torch.device | None:
    """Where the weight is when it is used: accelerate keeps an offloaded one on the meta device until then. None: there
    is none with numbers."""
    hook = getattr(base, "_hf_hook", None)
    if weight is None or (weight.is_meta and hook is None):
        return None
    return device_of(getattr(hook, "execution_device", None)) if weight.is_meta else weight.device


def _existing(found: nn.Module, parameter: str | None) -> BaseTunerLayer | None:
    """The tuner layer that already stands at a target, for the same parameter."""
    layer: Any = found
    while isinstance(layer, BaseTunerLayer):
        if layer.parameter_name == parameter:
            return layer
        layer = layer._modules["base_layer"]
    return None
