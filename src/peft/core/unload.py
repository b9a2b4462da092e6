"""Merging for good, taking layers out again, and keeping tied weights right on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import PeftWarning, report
from . import onestep, passing, recycled
from .blocks import one_scratch
from .layer import BaseTunerLayer, tuner_layers
from .lent import own
from .onload import onload_layer
from .sharded.gather import is_lent
from .snapshot import whole
from .tie import Place, input_embedding, places, storage_key, tied_modules
from .tokens import check_disjoint
from .uncut import uncut
from .walking import walk
from .wrappers import AuxiliaryTrainingWrapper

Holder = tuple[nn.Module, str]
Work = list[tuple[BaseTunerLayer, tuple[str, ...]]]  # layers, and what is merged into each


def check_together(layer: Any, names: Sequence[str]) -> None:
    """Raise ValueError if these adapters cannot be active together in a layer."""
    if isinstance(layer, BaseTunerLayer) and len(names) > 1:
        check_disjoint(layer, names)
    if hasattr(type(layer), "check_active"):
        layer.check_active(names)


def check_merge(layers: Iterator[tuple[str, Any]], names: Sequence[str]) -> None:
    """Raise ValueError if these adapters cannot be merged together, or with those that are."""
    for _, layer in layers:
        if isinstance(layer, BaseTunerLayer):
            check_together(layer, tuple(dict.fromkeys([*layer.merged_adapters, *names])))
        elif hasattr(layer, "refuse_merge"):
            layer.refuse_merge(names)


def shared(model: nn.Module) -> dict[Any, list[Holder]]:
    """The weights that several modules hold, told by their storage: key -> (module, attribute) of each holder."""
    holders: dict[Any, list[Holder]] = {}
    for module in model.modules():
        for attr, p in module._parameters.items():
            if p is not None:
                holders.setdefault(storage_key(p), []).append((module, attr))
    return {key: found for key, found in holders.items() if len(found) > 1}


def untie(layers: list[BaseTunerLayer], names: Sequence[str], groups: dict[Any, list[Holder]]) -> None:
    """Give each layer that is about to be merged a weight and a bias of its own where others share them.

    Merging into a shared one would change the other module too (an output layer tied to the embedding, replicated
    layers). Unmerging puts the shared parameters back.

    Raises ValueError where FSDP2 spreads them: it would go on with the shared one. Nothing is changed then.
    """
    work = []
    for layer in layers if groups else ():
        if layer.tied is not None or not any(n in layer.adapters for n in names):
            continue
        base, view = layer.get_base_layer(), layer.view
        held = {attr: base._parameters.get(attr) for attr in (view.name, view.bias_name)}
        found = {attr: p for attr, p in held.items() if p is not None and storage_key(p) in groups}
        if any(is_lent(base, attr) for attr in found):
            raise ValueError(
                f"The weight of {layer._where()!r} is tied to that of another module, and fully_shard has spread both "
                "as one, so a merge cannot give it a weight of its own. Save the adapter and merge it where the model "
                "is not spread (`peft merge` does it file by file), or untie the weights before fully_shard is called."
            )
        work.append((layer, base, found))
    for layer, base, found in work:
        for attr, p in found.items():
            alone = p.detach() if own(base, attr) else p.detach().clone()  # W' will take other memory
            base._parameters[attr] = nn.Parameter(alone, requires_grad=p.requires_grad)
        if found:
            layer.__dict__["tied"] = found  # no children of the layer


def unload(tuner: Any, progressbar: bool, names: list[str] | None) -> nn.Module:
    """The base model with plain layers, after writing `names` into its weights (None: without merging)."""
    found = list(tuner_layers(tuner.model))
    layers = [layer for _, layer in found if isinstance(layer, BaseTunerLayer)]
    tied = tied_to_embedding(tuner.model)
    with one_scratch():
        work, ready = _unmerged(tuner.model, layers, names)
        if names is not None:
            _merge_for_good(tuner.model, work, ready, names, progressbar)
    with whole(tuner if isinstance(tuner, nn.Module) else tuner.model):
        several = places(tuner.model)
        for path, layer in reversed(found):
            take_out(tuner, path, layer, names, several)
        model = tuner.model
        passing.let_go(model)
        settle(model, tied)
    hooks = tuner.__dict__.get("hooks", [])
    while hooks:
        hooks.pop().remove()
    while hasattr(type(within := model._modules.get("base_model")), "unload"):  # a PeftModel that this one stood around
        within.peft_config.clear()
        model = within.model
    if "peft_config" in model.__dict__:
        del model.peft_config
    return model


def _unmerged(model: nn.Module, layers: list[BaseTunerLayer], names: list[str] | None) -> tuple[Work, Ready]:
    """The layers without merges that are not wanted, and what is to be merged into each, computed and checked.

    All layers are as they were if a check fails.
    """
    work: Work = []
    ready = Ready()
    before = [list(layer.merged_adapters) for layer in layers]
    try:
        for layer in layers:
            if layer.merged and (
                layer.disable_adapters or names is None or any(n not in names for n in layer.merged_adapters)
            ):
                layer.unmerge()
            mine = tuple(n for n in names or () if n in layer.adapters and n not in layer.merged_adapters)
            if mine and not ready.take(layer, mine):
                with onload_layer(layer, write=False):
                    layer.check_merge(mine, stay=False)
                    layer.check_finite(mine)
            work.append((layer, mine))
    except BaseException:
        if any(before):
            untie(layers, [name for merged in before for name in merged], shared(model))
        for layer, merged in zip(layers, before, strict=True):
            layer.go_back(merged)
        raise
    return work, ready


class Ready:
    """What has been found of ordinary layers, and the new weights of some: as many as a tile may hold half full.

    Other weights, whose numbers no bound tells to be finite, are computed twice, so that none is written before all are
    known to be.
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[onestep.Change, Any]] = {}
        self.room = recycled.TILE_BYTES // 2

    def take(self, layer: Any, names: tuple[str, ...]) -> bool:
        """Whether all is known that merging these adapters into a layer for good needs."""
        change = onestep.ordinary(layer, names[0]) if len(names) == 1 else None
        if change is None:
            return False
        made = None
        with torch.no_grad():
            if not change.bounded():
                size = change.size if change.weight.is_cpu else self.room + 1
                made = change.made() if size <= self.room else None
                if made is None:
                    return False
                self.room -= size
        self.found[id(layer)] = change, made
        return True

    def merged(self, layer: Any) -> bool:
        """Merge what was found, if something was."""
        found = self.found.pop(id(layer), None)
        return found is not None and onestep.merged_for_good(layer, *found)


def _merge_for_good(model: nn.Module, work: Work, ready: Ready, names: list[str], progressbar: bool) -> None:
    """Write what was checked, each layer in full: half a layer could not be told from a whole one afterwards."""
    groups = shared(model)
    untie([layer for layer, _ in work], names, groups)
    with uncut() as layer_ends:
        for layer, mine in progress(work, progressbar):
            if not ready.merged(layer):
                layer.merge_for_good(mine)
            layer_ends()
    retie(groups, work)


def progress(items: list[Any], show: bool, label: str = "Merging") -> Iterator[Any]:
    """The items, with a bar if `show` and tqdm is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        show = False
    yield from tqdm(items, desc=label) if show else items


def _update_of(layer: BaseTunerLayer, names: Sequence[str]) -> frozenset[Any]:
    """The memory of what adapters add to a layer, and their scalings: layers whose adapters are tied have the same."""
    scalings = ((name, layer.adapters[name].__dict__.get("scaling")) for name in names)
    memory = (storage_key(getattr(slot.owner, slot.attr)) for name in names for slot in layer.slots(name))
    return frozenset((*memory, *scalings))


def retie(groups: dict[Any, list[Holder]], work: Work, equal: Callable[[Any, Any], bool] = torch.equal) -> None:
    """Share again what is still equal after a merge.

    Tied adapters make equal weights up to the order of a sum, so their memory is compared and not their result.

    Arguments:
        groups: what `shared` told before the merge.
        work: the layers, and what was merged into each.
        equal: tells whether two parameters are equal.
    """
    updates = {id(layer.get_base_layer()): _update_of(layer, own) for layer, own in work}
    for (first, attr), *rest in groups.values():
        source = first._parameters[attr]
        for module, name in rest:
            other = module._parameters[name]
            if other is source or source is None or other is None or other.shape != source.shape:
                continue
            tied = bool(updates.get(id(module))) and updates[id(module)] == updates.get(id(first))
            if tied or equal(other, source):
                module._parameters[name] = source


def tied_to_embedding(model: nn.Module) -> list[str]:
    """Paths of the input embedding and of the modules that share its weight; none where nothing does."""
    modules = list(walk(model))
    embedding = input_embedding(model, modules)
    tied = [] if embedding is None else tied_modules(embedding, modules)
    return [embedding[0], *tied] if embedding is not None and tied else []


def settle(model: nn.Module, tied: list[str]) -> None:
    """Make modules that were tied, and are so no longer, a model that can be saved and loaded.

    A file holds a shared weight under one name, and the configuration says once for all whether the others are read
    from there. So where one was changed, each gets a weight of its own, and the configuration says that none is tied.
    """
    held: list[Any] = [model.get_submodule(path) for path in tied]
    if all(module.weight is held[0].weight for module in held):
        return
    several = places(model)
    for module in list(held):
        for owner, name in several.get(id(module), ())[1:]:
            held.append(copy.deepcopy(module, {id(module.weight): module.weight}))
            owner._modules[name] = held[-1]
    seen: set[Any] = set()
    for module in held:
        weight = module.weight
        if storage_key(weight) in seen:
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        seen.add(storage_key(weight))
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    if _keeps_untied(config):
        config.tie_word_embeddings = False
        then = "config.tie_word_embeddings was set to False. Save the model with this configuration."
    else:
        then = (
            f"{type(config).__name__} has no untied form, so its tie_word_embeddings stays True: transformers 5 loads "
            "the saved weights apart, as they differ, but `tie_weights()`, or an older release, would tie them again. "
            "ensure_weight_tying=True adapts all of them alike."
        )
    text = (
        f"The adapter changed only some of the tied embedding weights ({', '.join(tied)}), so they are no longer tied "
        f"in the returned model, and each has a weight of its own. {then[0].upper() + then[1:]}"
    )
    report(PeftWarning, text, strict=False)


def _keeps_untied(config: Any) -> bool:
    """Whether a configuration with tie_word_embeddings=False is read back as that and nothing else (T5's is not)."""
    try:
        before = type(config).from_dict(config.to_dict()).to_dict()
        after = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False}).to_dict()
    except Exception:  # no configuration of transformers: nothing is read back
        return True
    return bool(after == {**before, "tie_word_embeddings": False})


def take_out(tuner: Any, path: str, layer: Any, names: list[str] | None, several: dict[int, list[Place]]) -> None:
    if isinstance(layer, AuxiliaryTrainingWrapper):
        plain = layer.unload_and_optionally_merge_module(names is not None, False, names)
    else:
        plain = layer._modules["base_layer"]
        if isinstance(layer, BaseTunerLayer) and (kind := layer.packed) is not None:
            kind.release(layer.get_base_layer())
    if not path:
        tuner._modules["model"] = plain
        return
    parent_path, _, leaf = path.rpartition(".")
    parent = tuner.model.get_submodule(parent_path) if parent_path else tuner.model
    for owner, name in several.get(id(layer), [(parent, leaf)]):
        owner._modules[name] = plain
