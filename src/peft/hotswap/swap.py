"""Putting another adapter's weights in place of one that a model runs, without taking the model apart.

Every tensor of the new adapter is matched and checked first; then all are written, or none. Scaling, rank and the
configuration follow the weights. In a model that `prepare_model_for_compiled_hotswap` has given room, adapters of any
rank up to the room's fit the same tensors, so that compiled code stays valid.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.checkpoint import adapter_config, load_peft_weights, set_peft_model_state_dict
from ..core.entries import Entry, entries_of, plain
from ..core.files import in_hand
from ..core.fill import as_held, paired, same_kind
from ..core.hub import DOWNLOAD_ARGUMENTS
from ..core.layer import BaseTunerLayer, tuner_layers
from ..core.method import LowRank, Site
from ..core.parts import joined
from ..core.pattern import settings
from ..core.stack import Adapter, tensors_below
from ..core.tuner import no_collection
from ..core.wrappers import ModulesToSaveWrapper
from ..errors import listing, nearest
from ..registry import tuner_class
from .compatible import OF_THE_FILE, SELECTED, check_hotswap_configs_compatible

Undo = list[Callable[[], Any]]


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
    check_hotswap_configs_compatible(old, config)
    if old.is_prompt_learning:
        set_peft_model_state_dict(root, state_dict, adapter_name, strict=True)
        return
    with torch.no_grad(), no_collection():
        swap = Swap(root, adapter_name, old, config)
        swap.match(state_dict)
        undo: Undo = []
        try:
            swap.write(undo)
        except BaseException:
            for step in reversed(undo):
                step()
            raise


@dataclass
class Change:
    """What becomes of the adapter in one layer.

    Arguments:
        p: the adapter there.
        settings: the new configuration as it holds for the layer.
        built: what the new adapter consists of, on the meta device.
        places: the tensors that are there.
        tensors: {name of a tensor in the layer: its new value}.
        neutral: the new adapter has nothing here.
    """

    p: Adapter
    settings: Any
    built: dict[str, Any]
    places: list[Entry]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    neutral: bool = False


class Swap:
    """One exchange: match everything, then write everything.

    Arguments:
        root: the model that the names of tensors are relative to.
        name: the adapter.
        old: its configuration, which takes the new one's values.
        new: the new adapter's configuration.
    """

    def __init__(self, root: nn.Module, name: str, old: Any, new: Any):
        self.root, self.name, self.old, self.new = root, name, old, new
        self.changes: list[Change] = []
        self.copies: list[tuple[Entry, Tensor]] = []
        self.kind = tuner_class(old.peft_type)
        self.values = {
            f.name: getattr(new, f.name)
            for f in dataclasses.fields(old)
            if f.name not in SELECTED | OF_THE_FILE and hasattr(new, f.name)
        }
        self.future = copy.copy(old)
        vars(self.future).update(self.values)

    # ---- looking -----------------------------------------------------------------------------------------------

    def match(self, state: Mapping[str, Tensor]) -> None:
        """Find the place of every tensor; raises if one has none, or a place gets none."""
        for path, layer in tuner_layers(self.root):
            if self.name in layer.merged_adapters:
                raise ValueError(f"Adapter {self.name!r} is merged in {path!r}. Unmerge it first, then swap.")
        entries = entries_of(self.root, self.old, self.name)
        state = joined(entries, state)
        found, left = paired(entries, state)
        if not state:
            raise RuntimeError(f"Hot-swapping the adapter {self.name!r} failed: the new adapter has no tensors.")
        same_kind(found)
        by_layer: dict[int, list[Entry]] = {}
        for entry in entries:
            by_layer.setdefault(id(entry.adapter) if entry.adapter is not None else id(entry), []).append(entry)
        for group in by_layer.values():
            given = {e.live: found[e.live][1] for e in group if e.live in found}
            if group[0].adapter is not None and _of_method(group[0]):
                stem = plain(group[0].key.removesuffix(group[0].part))
                more = {k.rpartition(stem)[2]: k for k in left if stem and stem in k} if left else {}
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

    def _layer(self, group: list[Entry], given: dict[str, Tensor], more: dict[str, Tensor]) -> None:
        p: Any = group[0].adapter
        own = settings(self.future, p.path)
        if p.method not in (self.kind.method_of(own), self.kind.out_projection_method_of(own)):
            raise ValueError(f"The new adapter has another form at {p.path!r}. Load it under a name of its own.")
        tensor = next((e.tensor for e in group if e.tensor.is_floating_point()), group[0].tensor)
        base = p.layer.get_base_layer()
        site = Site(base, p.layer.view, own, p.path, tensor.dtype, torch.device("meta"), p.shared)
        with warnings.catch_warnings(), in_hand([*(e.part for e in group), *more]):
            warnings.simplefilter("ignore")  # what there is to say of the settings was said when the layer was made
            change = Change(p, own, p.method.build(site), group)
        self.changes.append(change)
        if not given:
            inside = getattr(p.method, "of", p.method)
            if not isinstance(inside, LowRank):
                raise RuntimeError(
                    f"The new adapter has no tensors for {p.path!r}, and {type(inside).__name__} has none that leave a "
                    "layer as it is. Load it under a name of its own."
                )
            change.neutral = True
            change.tensors = {k: torch.zeros(shape) for k, shape in _shapes(change).items()}
            return
        wanted = _shapes(change)
        have = {**{e.part: given[e.live] for e in group if e.live in given}, **more}
        if missing := sorted(set(wanted) - set(have)):
            raise RuntimeError(
                f"The new adapter lacks {listing(missing)} of {p.path!r}, of which it has other tensors."
            )
        for key, value in have.items():
            if key not in wanted or tuple(value.shape) != wanted[key]:
                raise RuntimeError(
                    f"size mismatch: {key} of {p.path!r} has the shape {tuple(value.shape)}, but the new configuration "
                    f"asks for {wanted.get(key)}."
                )
        change.tensors = have

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
        for entry, value in self.copies:
            _copy(entry.tensor, as_held(value, entry.tensor), undo)
        for change in self.changes:
            self._write(change, undo)
        before = dict(vars(self.old))
        undo.append(lambda: vars(self.old).update(before))
        vars(self.old).update(self.values)
        for change in self.changes:
            change.p.settings = settings(self.old, change.p.path)

    def _write(self, change: Change, undo: Undo) -> None:
        p = change.p
        changed = _plain_values(change, undo)
        fitting = _fitting(change)
        if fitting is None:
            _rebuild(change, undo)
            return
        for place in change.places:
            _copy(place.tensor, as_held(fitting[place.part], place.tensor), undo)
        if changed or change.neutral:
            p.method.derive(p, p.layer.stack(()))
            for place in change.places if not change.neutral else ():  # what is derived may be learnt: magnitudes
                place.tensor.copy_(as_held(fitting[place.part], place.tensor))
            p.layer._replan()


def _plain_values(change: Change, undo: Undo) -> bool:
    """The new rank, scaling ...; a scaling that is a tensor stays the same object. Returns whether any has changed."""
    p = change.p
    before = {k: v for k, v in p.__dict__.items() if k in p.layer._plain or k == "settings"}
    scales = {k: v.clone() for k, v in before.items() if isinstance(v, Tensor)}

    def back() -> None:
        p.__dict__.update(before)
        for key, value in scales.items():
            before[key].copy_(value)
        p.layer._replan()

    undo.append(back)
    p.settings, changed = change.settings, False
    for key, value in change.built.items():
        if isinstance(value, (Tensor, nn.Module)):
            continue
        held = p.__dict__.get(key)
        if isinstance(held, Tensor):
            held.fill_(float(value))
        else:
            changed = changed or held != value
            p.__dict__[key] = value
    return changed


def _fitting(change: Change) -> dict[str, Tensor] | None:
    """The new values in the shapes of the tensors that are there, or None if some do not fit."""
    p, found = change.p, dict[str, Tensor]()
    if {e.part for e in change.places} != set(change.tensors):
        return None
    for place in change.places:
        value: Tensor | None = change.tensors[place.part]
        shape = tuple(place.tensor.shape)
        if value is not None and value.shape != shape:
            value = p.method.fitted(p, place.part, value, shape)
        if value is None:
            return None
        found[place.part] = value
    return found


def _rebuild(change: Change, undo: Undo) -> None:
    """Put the modules that the new configuration builds in place of those that are too small."""
    p, layer = change.p, change.p.layer
    first = layer.slots(p.name)[0].tensor
    flags = {q.requires_grad for q in layer.adapter_parameters(p.name)}
    homes = {k: h for k, h in layer._modules.items() if k != "base_layer" and p.name in h}
    before = {k: h[p.name] for k, h in homes.items()}

    def back() -> None:
        for key, value in before.items():
            layer._file(key, p.name, value, p)
        layer._replan()

    undo.append(back)
    for key, value in change.built.items():
        if isinstance(value, (Tensor, nn.Module)):
            layer._file(key, p.name, value, p)
    for slot in layer.slots(p.name):
        value = change.tensors[slot.key].detach().to(first.device, slot.tensor.dtype, copy=True)
        held = slot.owner._parameters if slot.attr in slot.owner._parameters else slot.owner._buffers
        is_parameter = isinstance(slot.tensor, nn.Parameter)
        held[slot.attr] = nn.Parameter(value, requires_grad=any(flags)) if is_parameter else value
    p.method.derive(p, layer.stack(()))
    for slot in layer.slots(p.name) if not change.neutral else ():
        slot.tensor.copy_(as_held(change.tensors[slot.key], slot.tensor))
    layer._replan()


def _copy(here: Tensor, value: Tensor, undo: Undo) -> None:
    before = here.detach().clone()
    undo.append(lambda: here.copy_(before))
    here.copy_(value)


def _of_method(entry: Entry) -> bool:
    """Whether an entry is a tensor of the method, and not of what is trained beside it."""
    return isinstance(entry.layer, BaseTunerLayer) and not getattr(entry.adapter.method, "indices", None)  # type: ignore


def _shapes(change: Change) -> dict[str, tuple[int, ...]]:
    """The tensors that the new adapter has in a layer, by key."""
    p, found = change.p, {}
    for key, value in change.built.items():
        if isinstance(value, nn.Module):
            for owner, leaf, attr in tensors_below(value):
                tensor: Any = owner._parameters.get(attr)
                tensor = owner._buffers[attr] if tensor is None else tensor
                found[p.method.checkpoint_key(f"{key}.{leaf}")] = tuple(tensor.shape)
        elif isinstance(value, (nn.Parameter, nn.Buffer)):
            found[p.method.checkpoint_key(key)] = tuple(value.shape)
    return found
