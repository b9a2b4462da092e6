"""Putting another adapter's weights in place of one that a model runs, without taking the model apart.

Every tensor of the new adapter is matched and checked first; then all are written, or none. Scaling, rank and the
configuration follow the weights. In a model that `prepare_model_for_compiled_hotswap` has given room, adapters of any
rank up to the room's fit the same tensors, so that compiled code stays valid.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.base_state import model_below
from ..core.checkpoint import adapter_config, load_peft_weights, set_peft_model_state_dict
from ..core.collector import no_collection
from ..core.embeddings import embedding_tensors
from ..core.entries import Entry, entries_of, plain
from ..core.experts import fused, rewrite
from ..core.files import in_hand
from ..core.fill import as_held, paired, same_kind, torn_in
from ..core.hub import DOWNLOAD_ARGUMENTS
from ..core.layer import BaseTunerLayer
from ..core.method import LowRank, Site
from ..core.parts import joined
from ..core.pattern import settings
from ..core.renames import Key, found_again, of_now, renamed_paths, tables_of_now
from ..core.sharded import full, lent_back
from ..core.shared import part
from ..core.stack import Adapter
from ..core.wrappers import ModulesToSaveWrapper
from ..errors import listing, nearest
from ..registry import tuner_class
from .change import Change, Fit, Undo, derive, fitting, rebuild, write_all
from .compatible import OF_THE_FILE, SELECTED, check_hotswap_configs_compatible, check_kind


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the weights of a loaded adapter by those of a saved one, in place.

    Arguments:
        model: a PeftModel, or a model with injected adapters; it may be compiled.
        model_name_or_path: folder or repository of the new adapter.
        adapter_name: the adapter that is replaced.
        torch_device: where the file is read to; None is the CPU.
        kwargs: `subfolder`, `revision`, `token` ..., `key_mapping`.

    Raises what `hotswap_adapter_from_state_dict` raises; the model is then unchanged.
    """
    hub = {k: v for k, v in kwargs.items() if k in DOWNLOAD_ARGUMENTS}
    config = PeftConfig.from_pretrained(model_name_or_path, subfolder=kwargs.get("subfolder"), **hub)
    mapping = kwargs.get("key_mapping")
    if mapping is None:
        mapping = getattr(model_below(model), "_checkpoint_conversion_mapping", None) or None
    folder = {} if kwargs.get("subfolder") is None else {"subfolder": kwargs["subfolder"]}
    state = load_peft_weights(model_name_or_path, device=torch_device, key_mapping=mapping, **hub, **folder)
    hotswap_adapter_from_state_dict(model, state, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace the weights of a loaded adapter, in place.

    Arguments:
        model: a PeftModel, or a model with injected adapters; it may be compiled.
        state_dict: the new adapter's tensors by checkpoint key, for all layers of the loaded one or some; the update of
            the others becomes zero.
        adapter_name: the adapter that is replaced.
        config: the new adapter's configuration.
        parameter_prefix: kept for compatibility; tensors are found by their whole names.

    Raises ValueError if the two differ in more than selection, rank and scaling, or if the adapter is merged,
    RuntimeError for tensors that have no place, are missing, or have another shape. The model is then unchanged.
    """
    root = model._modules.get("_orig_mod", model) or model
    old = adapter_config(root, adapter_name)
    check_kind(old, config)
    if old.is_prompt_learning:
        check_hotswap_configs_compatible(old, config)
        set_peft_model_state_dict(root, state_dict, adapter_name, strict=True)
        return
    put(root, state_dict, adapter_name, old, config)


def put(root: nn.Module, state: Mapping[str, Tensor], name: str, old: Any, new: Any, fixed: bool = False) -> Swap:
    """Write another adapter's tensors and configuration, all or nothing; returns what was done.

    Arguments:
        root: the model that the names of tensors are relative to.
        state: the new adapter's tensors by checkpoint key.
        name: the adapter that is replaced.
        old: its configuration.
        new: the new adapter's configuration.
        fixed: refuse what does not fit in the tensors that are there.
    """
    lent_back(root)
    with torch.no_grad(), no_collection():
        swap = Swap(root, name, old, new, fixed)
        swap.match(state)
        undo: Undo = []
        try:
            swap.write(undo)
        except BaseException:
            for step in reversed(undo):
                step()
            raise
    return swap


class Swap:
    """One exchange: match everything, then write everything.

    Arguments:
        root: the model that the names of tensors are relative to.
        name: the adapter.
        old: its configuration, which takes the new one's values.
        new: the new adapter's configuration.
        fixed: refuse what does not fit in the tensors that are there.
    """

    def __init__(self, root: nn.Module, name: str, old: Any, new: Any, fixed: bool = False):
        self.root, self.name, self.old, self.fixed = root, name, old, fixed
        self.changes: list[Change] = []
        self.copies: list[tuple[Entry, Tensor]] = []
        self.kind = tuner_class(old.peft_type)
        self._become(copy.copy(new))

    def _become(self, new: Any) -> None:
        """Take a configuration for the new adapter's."""
        self.new = new
        self.methods: dict[int, tuple[Any, Any]] = {}  # by the settings of a layer
        self.forms: dict[Any, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {}  # see `Method.form`
        self.values = {
            f.name: getattr(new, f.name)
            for f in dataclasses.fields(self.old)
            if f.name not in SELECTED | OF_THE_FILE and hasattr(new, f.name)
        }
        self.future = copy.copy(self.old)
        vars(self.future).update(self.values)

    # ---- looking -----------------------------------------------------------------------------------------------

    def match(self, state: Mapping[str, Tensor]) -> None:
        """Find the place of every tensor; raises if one has none, or a place gets none."""
        entries = entries_of(self.root, self.old, self.name)
        for entry in entries:
            merged: Any = getattr(entry.layer, "merged_adapters", ())
            if entry.adapter is not None and self.name in merged:
                path = entry.adapter.path
                raise ValueError(f"Adapter {self.name!r} is merged in {path!r}. Unmerge it first, then swap.")
        state = joined(entries, self._of_now(entries, state))
        if not self.fixed:
            check_hotswap_configs_compatible(self.old, self.new)
        found, left = paired(entries, state)
        if not state:
            raise RuntimeError(f"Hot-swapping the adapter {self.name!r} failed: the new adapter has no tensors.")
        same_kind(found)
        if torn := torn_in(found):
            raise RuntimeError(
                f"Hot-swapping the adapter {self.name!r} failed: {listing(torn)} are the same tensors in it, tied by "
                "ensure_weight_tying, but differ in the new adapter. Load the new adapter under a name of its own."
            )
        left = self._embeddings(state, left)
        by_layer: dict[int, list[Entry]] = {}
        for entry in entries:
            by_layer.setdefault(id(entry.adapter) if entry.adapter is not None else id(entry), []).append(entry)
        for group in by_layer.values():
            given = {e.live: found[e.live][1] for e in group if e.live in found}
            if group[0].adapter is not None and _of_method(group[0]):
                stem = plain(group[0].key.removesuffix(group[0].part))
                more = {k.rpartition(stem)[2]: k for k in left if stem and stem in k}
                more = {part: k for part, k in more.items() if not part.startswith("base_layer.")}  # of another inside
                self._layer(group, given, {part: state[k] for part, k in more.items()})
                left = [k for k in left if k not in more.values()]
            else:
                self._others(group, given)
        if left:
            raise RuntimeError(
                f"Hot-swapping the adapter {self.name!r} failed: {len(left)} tensors have no place in it: "
                f"{listing(left)}.{nearest(left[0], [e.key for e in entries[:500]])} The new adapter may select fewer "
                "layers than the loaded one, not others."
            )

    def _embeddings(self, state: Mapping[str, Tensor], left: list[str]) -> list[str]:
        """Note the base's embeddings that are saved beside the new adapter; returns the keys that are none."""
        if not left:
            return left
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models that do not say which their embeddings are
            entries = embedding_tensors(self.root, self.old, self.name, True)
        found, left = paired(entries, {key: state[key] for key in left})
        same_kind(found)
        for entry, value in found.values():
            here = full(entry.value().detach())
            if value.shape == here.shape and torch.equal(value.to(here.device, here.dtype), here):
                continue
            if value.shape != here.shape or self.fixed or entry.tensor.is_meta:
                raise RuntimeError(
                    f"The new adapter brings embeddings of its own, {tuple(value.shape)}, which are not those of the "
                    f"model ({entry.key}, {tuple(here.shape)}). Put it on a model of its own."
                )
            self.copies.append((entry, value))
        return left

    def _of_now(self, entries: list[Entry], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The new adapter's tensors, and its configuration, under the names that the model's modules have now."""
        root: Any = self.root
        rewrite(self.new, model_below(root))
        self._become(self.new)
        groups: dict[int, list[Entry]] = {}
        for e in entries:
            groups.setdefault(id(e.adapter), []).append(e)

        def fits(key: Key, e: Entry) -> bool:
            p: Any = e.adapter
            if p is None or not _of_method(e):
                return tuple(e.tensor.shape) == key.shape
            own = settings(self.future, ".".join(key.path))
            if p.method not in self._methods(own):
                return False
            return self._built(p, own, groups[id(p)], {}).shapes.get(e.part) == key.shape

        state = of_now(self.old, fused(self.root, state))
        new = found_again(self.root, entries, state, fits)
        if new is not state:
            vars(self.new).update(tables_of_now(self.new, renamed_paths(entries, state, new)))
            self._become(self.new)
        return new

    def _layer(self, group: list[Entry], given: dict[str, Tensor], more: dict[str, Tensor]) -> None:
        p: Any = group[0].adapter
        own = settings(self.future, p.path)
        if p.method not in self._methods(own):
            raise ValueError(f"The new adapter has another form at {p.path!r}. Load it under a name of its own.")
        change = self._built(p, own, group, more)
        self.changes.append(change)
        if not given:
            inside = getattr(p.method, "of", p.method)
            inside = inside if getattr(p.method, "neutral_zeros", True) else p.method
            if not isinstance(inside, LowRank) or not inside.neutral_zeros:
                raise RuntimeError(
                    f"The new adapter has no tensors for {p.path!r}, and {type(inside).__name__} has none that leave a "
                    "layer as it is. Load it under a name of its own."
                )
            change.neutral = True
            change.tensors = {
                k: torch.zeros(shape, dtype=torch.float32, device="cpu") for k, shape in change.shapes.items()
            }
            return
        wanted = change.shapes
        have = {**{e.part: given[e.live] for e in group if e.live in given}, **more}
        if missing := sorted(wanted.keys() - have.keys()):
            raise RuntimeError(
                f"The new adapter lacks {listing(missing)} of {p.path!r}, of which it has other tensors."
            )
        for key, value in have.items():
            if value.shape != wanted.get(key):
                raise RuntimeError(
                    f"size mismatch: {key} of {p.path!r} has the shape {tuple(value.shape)}, but the new configuration "
                    f"asks for {wanted.get(key)}."
                )
        change.tensors = have

    def _methods(self, own: Any) -> tuple[Any, Any]:
        """The method of a layer with these settings, and of an out-projection."""
        found = self.methods.get(id(own))
        if found is None:
            found = (self.kind.method_of(own), self.kind.out_projection_method_of(own))
            self.methods[id(own)] = found
        return found

    def _built(self, p: Any, own: Any, group: list[Entry], more: dict[str, Tensor]) -> Change:
        """What the new adapter consists of in a layer; layers of the same form share it."""
        change = Change(p, own, group)
        tensor = next((e.tensor for e in group if e.tensor.is_floating_point()), group[0].tensor)
        base = p.layer.get_base_layer()
        site = Site(
            base, p.layer.view, own, p.path, tensor.dtype, torch.device("meta"), p.shared, p.layer, tensor.device
        )
        site = p.layer._noting(site)
        form = p.method.form(site) if not more else None
        key = (id(own), p.method, tensor.dtype, form)
        if form is not None and key in self.forms:
            change.site, (change.plain, change.shapes) = site, self.forms[key]
            return change
        with warnings.catch_warnings(), in_hand([*(e.part for e in group), *more]):
            warnings.simplefilter("ignore")  # what there is to say of the settings was said when the layer was made
            change.build(site)
        if form is not None:
            self.forms[key] = (change.plain, change.shapes)
        return change

    def _others(self, group: list[Entry], given: dict[str, Tensor]) -> None:
        """Copies of modules, rows of tokens, biases: as they are given, or as the base has them."""
        for entry in group:
            value = given.get(entry.live)
            if value is None and isinstance(entry.layer, ModulesToSaveWrapper):
                value = entry.layer.original_module.state_dict()[entry.part or entry.key.rpartition(".")[2]]
            if value is None or value.shape != entry.tensor.shape:
                what = "is missing" if value is None else f"has the shape {tuple(value.shape)}"
                raise RuntimeError(
                    f"{entry.key} of the new adapter {what}; the model's is {tuple(entry.tensor.shape)}."
                )
            self.copies.append((entry, value))

    # ---- writing -----------------------------------------------------------------------------------------------

    def write(self, undo: Undo) -> None:
        """Write everything; `undo` receives the steps that take it back."""
        before = dict(vars(self.old))
        undo.append(lambda: vars(self.old).update(before))
        ready = [(change, fitting(change)) for change in self.changes]
        large = next((change for change, fit in ready if fit is None), None) if self.fixed else None
        if large is not None:
            raise RuntimeError(
                f"The adapter does not fit in the room at {large.p.path!r}: it has {large.shapes}, and there is "
                f"{ {e.part: tuple(e.tensor.shape) for e in large.places} }."
            )
        part(entry for entry, _ in self.copies)
        copies = ((entry.tensor, value) for entry, value in self.copies)
        fits = [Fit(tensor, tensor, as_held(value, tensor)) for tensor, value in copies]
        self._plain_values(undo)
        write_all([*fits, *chain.from_iterable(fits for _, fits in ready if fits is not None)], undo)
        for change, own in ready:
            if own is None:
                rebuild(change, undo)
            elif change.changed or change.neutral:
                derive(change, own)
        vars(self.old).update(self.values)
        for change in self.changes:
            change.p.settings = self.old if change.settings is self.future else change.settings

    def _plain_values(self, undo: Undo) -> None:
        """The new ranks, scalings ...; a scaling that is a tensor stays the same object."""
        befores: list[tuple[Adapter, dict[str, Any]]] = []
        scales: list[Tensor] = []
        numbers: list[float] = []

        def back() -> None:
            for p, before in befores:
                p.__dict__.update(before)
                p.layer._replan()

        undo.append(back)
        for change in self.changes:
            p, held = change.p, change.p.__dict__
            tensors = [k for k in change.plain if isinstance(held.get(k), Tensor)]
            new = {k: v for k, v in change.plain.items() if k in tensors or k not in held or held[k] != v}
            befores.append((p, {k: held[k] for k in ("settings", *new) if k in held}))
            scales += [held[k] for k in tensors]
            numbers += [float(new.pop(k)) for k in tensors]
            held.update(new, settings=change.settings)
            change.changed = not new.keys() <= p.method.free(p)
        if scales:
            wide = next((t.dtype for t in scales if t.dtype is torch.float64), scales[0].dtype)
            new_scales = torch.tensor(numbers, dtype=wide, device=scales[0].device).unbind()
            write_all([Fit(t, t, n.to(t)) for t, n in zip(scales, new_scales, strict=True)], undo)


def _of_method(entry: Entry) -> bool:
    """Whether an entry is a tensor of the method, and not of what is trained beside it."""
    return isinstance(entry.layer, BaseTunerLayer) and not getattr(entry.adapter.method, "indices", None)  # type: ignore
