"""Merging for good, taking layers out again, and keeping tied weights right on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import PeftWarning, report
from .layer import BaseTunerLayer, tuner_layers
from .tie import storage_key
from .tokens import TrainableTokensLayer, check_disjoint
from .wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

Holder = tuple[nn.Module, str]


def check_together(layer: Any, names: Sequence[str]) -> None:
    """Raise ValueError if these adapters cannot be active together in a layer."""
    if isinstance(layer, ModulesToSaveWrapper):
        layer.check_active(names)
    elif isinstance(layer, TrainableTokensLayer):
        check_disjoint(layer, names)


def shared(model: nn.Module) -> dict[Any, list[Holder]]:
    """The weights that several modules hold, told by their storage: key -> (module, attribute) of each holder."""
    holders: dict[Any, list[Holder]] = {}
    for module in model.modules():
        for attr, p in module._parameters.items():
            if p is not None:
                holders.setdefault(storage_key(p), []).append((module, attr))
    return {key: found for key, found in holders.items() if len(found) > 1}


def untie(layers: list[BaseTunerLayer], names: Sequence[str], groups: dict[Any, list[Holder]]) -> None:
    """Give each layer that is about to be merged a weight of its own where others share it.

    Merging into a shared weight would change the other module too (an output layer tied to the embedding, replicated
    layers). Unmerging puts the shared parameter back.
    """
    for layer in layers:
        base, attr = layer.get_base_layer(), layer.view.name
        weight = base._parameters.get(attr)
        if weight is None or layer.tied is not None or not any(n in layer.adapters for n in names):
            continue
        if storage_key(weight) in groups:
            layer.__dict__["tied"] = weight  # not a child of the layer
            base._parameters[attr] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def unload(tuner: Any, progressbar: bool, names: list[str] | None) -> nn.Module:
    """The base model with plain layers, after writing `names` into its weights (None: without merging)."""
    found = list(tuner_layers(tuner.model))
    layers = [layer for _, layer in found if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        if layer.merged and (
            layer.disable_adapters or names is None or any(n not in names for n in layer.merged_adapters)
        ):
            layer.unmerge()
    if names is not None:
        _merge_for_good(tuner.model, layers, names, progressbar)
    for path, layer in reversed(found):
        _take_out(tuner, path, layer, names)
    model = tuner.model
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _merge_for_good(model: nn.Module, layers: list[BaseTunerLayer], names: list[str], progressbar: bool) -> None:
    """Compute and check every block of every layer first; only then write."""
    work = []
    for layer in layers:
        own = tuple(n for n in names if n in layer.adapters and n not in layer.merged_adapters)
        if own:
            layer.check_merge(own)
            for _ in layer.tiles(own):
                pass
        work.append((layer, own))
    groups = shared(model)
    untie(layers, names, groups)
    for layer, own in _progress(work, progressbar):
        layer._merge(own, keep=False)
    _retie(model, list(groups.values()), {id(layer.get_base_layer()): _update(layer, own) for layer, own in work})


def _progress(items: list[Any], show: bool) -> Iterator[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        show = False
    yield from tqdm(items, desc="Merging") if show else items


def _update(layer: BaseTunerLayer, names: Sequence[str]) -> frozenset[Any]:
    """The memory of what adapters add to a layer: layers whose adapters are tied have the same."""
    return frozenset(storage_key(getattr(slot.owner, slot.attr)) for name in names for slot in layer.slots(name))


def _retie(model: nn.Module, groups: list[list[Holder]], updates: dict[int, frozenset[Any]]) -> None:
    """Share again what is still equal; say so in the model's configuration where it is not.

    Tied adapters make equal weights up to the order of a sum, so their memory is compared and not their result.
    """
    for (first, attr), *rest in groups:
        source = first._parameters[attr]
        for module, name in rest:
            other = module._parameters[name]
            if other is source or source is None or other is None or other.shape != source.shape:
                continue
            tied = bool(updates.get(id(module))) and updates[id(module)] == updates.get(id(first))
            if tied or torch.equal(other, source):
                module._parameters[name] = source
            else:
                _note_untied(model)


def _note_untied(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        text = (
            "The adapter changed only one of two tied embedding weights, so they are no longer tied in the merged "
            "model, and config.tie_word_embeddings was set to False. Save the model with this configuration."
        )
        report(PeftWarning, text, strict=False)


def _take_out(tuner: Any, path: str, layer: Any, names: list[str] | None) -> None:
    if isinstance(layer, AuxiliaryTrainingWrapper):
        plain = layer.unload_and_optionally_merge_module(names is not None, False, names)
    else:
        plain = layer._modules["base_layer"]
    if not path:
        tuner._modules["model"] = plain
        return
    parent_path, _, leaf = path.rpartition(".")
    parent = tuner.model.get_submodule(parent_path) if parent_path else tuner.model
    parent._modules[leaf] = plain
