"""Giving an adapter's layers other ranks and first factors, before its training: the second half of EVA."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ...core.layer import BaseTunerLayer, tuner_layers
from ...core.place import Injection
from ...core.tie import places
from ...errors import PeftWarning, listing


def give(model: Any, name: str, found: dict[str, Tensor], told: bool = False) -> None:
    """Give each adapted layer the factor A that is found under its path, with its rank; B is zero.

    Arguments:
        model: a PeftModel.
        name: the adapter.
        found: {path in the base model: (rank, in)}.
        told: layers without one have been told of.

    Raises ValueError for a matrix that does not fit, and where nothing would be left; the model is then unchanged.
    """
    root, config = model.get_base_model(), model.peft_config[name]
    layers = {
        path: layer
        for path, layer in tuner_layers(root)
        if isinstance(layer, BaseTunerLayer) and name in layer.adapters
    }
    _check(layers, found)
    lacking = [path for path in layers if path not in found]
    if lacking and not told:
        text = f"EVA has nothing for {listing(lacking)}, which keep their rank and start as with True."
        warnings.warn(text, PeftWarning, stacklevel=4)
    _note(config, layers, name, found)
    several = places(root)
    for path, layer in layers.items():
        if path not in found:
            continue
        if len(found[path]):
            _rebuild(model.base_model, path, layer, name, found[path])
        else:
            _remove(model.base_model, path, layer, name, several)


def _check(layers: dict[str, Any], found: dict[str, Tensor]) -> None:
    wrong = [path for path in found if path not in layers]
    if wrong:
        raise ValueError(f"eva_state_dict has {listing(wrong)}, which the adapter does not adapt.")
    for path, A in found.items():
        size = layers[path].view.shape(layers[path].get_base_layer())[-1]
        if A.dim() != 2 or A.shape[1] != size:
            raise ValueError(f"eva_state_dict[{path!r}] is {tuple(A.shape)}, but the layer has {size} in-features.")
    if all(path in found and not len(found[path]) for path in layers):
        raise ValueError("eva_state_dict leaves every layer without a rank.")


def _note(config: Any, layers: dict[str, Any], name: str, found: dict[str, Tensor]) -> None:
    """The configuration of what will be there: names, ranks and scalings, for files and for `add_adapter`."""
    kept = {path: layer.adapters[name] for path, layer in layers.items() if len(found.get(path, "kept"))}
    ranks = {path: len(found[path]) if path in found else p.r for path, p in kept.items()}
    alphas = {path: p.lora_alpha for path, p in kept.items()}
    if config.eva_config.adjust_scaling_factors:
        for path, p in kept.items():
            grown = ranks[path] / p.r
            alphas[path] *= math.sqrt(grown) if p.use_rslora else grown
    key = {path: _key(path, layers) for path in kept}
    config.target_modules = {key[path].removeprefix("^") for path in kept if layers[path].view.label != "ParamWrapper"}
    config.rank_pattern = {key[path]: r for path, r in ranks.items() if r != config.r}
    config.alpha_pattern = {key[path]: a for path, a in alphas.items() if a != config.lora_alpha}


def _key(path: str, layers: dict[str, Any]) -> str:
    """The path as a pattern; pinned to the top where another path ends in it."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in layers) else path


def _rebuild(tuner: Any, path: str, layer: Any, name: str, A: Tensor) -> None:
    old = layer.adapters[name]
    if len(A) == old.r and not old.lora_A.weight.is_meta:  # the very tensors stay, which an optimizer may hold
        old.lora_A.weight.copy_(A.reshape(old.lora_A.weight.shape))
        old.lora_B.weight.zero_()
        return
    wide = old.lora_A.weight.dtype
    trained = any(q.requires_grad for q in layer.adapter_parameters(name))
    layer._drop(name)
    place = Injection(tuner, tuner.model, name, wide is torch.float32, False, [])
    place._place(path)
    p = layer.adapters[name]
    p.lora_A.weight.copy_(A.reshape(p.lora_A.weight.shape))
    layer.set_requires_grad(name, trained)
    layer._replan()


def _remove(tuner: Any, path: str, layer: Any, name: str, several: Any) -> None:
    """Take the adapter away, and the layer with the last one."""
    layer._drop(name)
    layer._replan()
    if layer.adapters:
        return
    place = Injection(tuner, tuner.model, name, True, False, [])
    place.places = several
    parent, leaf, _ = place.get(path)
    place.put(parent, leaf, layer._modules["base_layer"], layer)
    if path in tuner.targeted_module_names:
        tuner.targeted_module_names.remove(path)
