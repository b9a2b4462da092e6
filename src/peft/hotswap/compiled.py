"""Room for other ranks and scalings, so that an exchange of adapters leaves compiled code valid."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from typing import Any, Literal

import torch
from torch import nn

from ..core.host import hosts
from ..core.layer import BaseTunerLayer, tuner_layers
from ..core.pattern import settings, special, tables
from ..core.snapshot import whole


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make a model ready for adapters of other ranks and scalings under torch.compile: call it before compiling.

    Arguments:
        model: a PeftModel, or a model with injected adapters.
        target_rank: the largest rank to come; tensors get room for it, without a change of what they compute. None:
            only scalings may change.
        config: a configuration, or {adapter: configuration}, whose ranks are to be set to `target_rank`.
        check_compiled: what to do with a model that is compiled already.

    Raises ValueError if there is no adapter, if one has a larger rank, or if `check_compiled` says so.
    """
    _check_compiled(model, check_compiled)
    adapters = [
        p for _, layer in tuner_layers(model) if isinstance(layer, BaseTunerLayer) for p in layer.adapters.values()
    ]
    if not adapters:
        raise ValueError("The model has no adapter layers, so there is nothing to prepare. Add an adapter first.")
    roomy = {p: p.method.roomy(p, target_rank) for p in adapters} if target_rank is not None else {}
    with whole(model):
        for p in adapters:
            _make_room(p, roomy.get(p, {}))
    if target_rank is not None:
        for one in config.values() if isinstance(config, dict) else [config] if config is not None else []:
            one.r = target_rank
            one.rank_pattern = dict.fromkeys(one.rank_pattern or {}, target_rank)


def _make_room(p: Any, tensors: dict[str, Any]) -> None:
    """Make an adapter's scaling a tensor, and put these tensors in place of smaller ones, by key."""
    if isinstance(p.__dict__.get("scaling"), (int, float)):
        dtype, device = p.layer._scalars()
        p.__dict__["scaling"] = torch.tensor(p.__dict__["scaling"], dtype=dtype, device=device)
    for slot in p.layer.slots(p.name):
        value = tensors.get(slot.key)
        if value is not None and value.shape != slot.tensor.shape:
            if slot.attr in slot.owner._buffers:
                slot.owner._buffers[slot.attr] = value
                continue
            _resize(slot.owner, *value.shape[:2])
            slot.owner._parameters[slot.attr] = nn.Parameter(value, requires_grad=slot.tensor.requires_grad)
    for key in tensors.keys() - {slot.key for slot in p.layer.slots(p.name)}:  # derived ones, which no file holds
        p.layer.keep(p, key, tensors[key])
    p.layer._replan()


def _check_compiled(model: nn.Module, check: str) -> None:
    if check not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled={check!r} is unknown. Use 'error', 'warn' or 'ignore'.")
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
    if not compiled or check == "ignore":
        return
    text = (
        "The model is compiled already; preparing it now makes it compile again. Call "
        "prepare_model_for_compiled_hotswap before torch.compile."
    )
    if check == "error":
        raise ValueError(text)
    warnings.warn(text, stacklevel=3)


def _resize(module: nn.Module, rows: int, columns: int = 0) -> None:
    """Let a module say the size that its weight has now."""
    for names, size in ((("out_features", "out_channels"), rows), (("in_features", "in_channels"), columns)):
        for name in names:
            if name in module.__dict__:
                module.__dict__[name] = size * (getattr(module, "groups", 1) if name == "in_channels" else 1)


def true_ranks(model: nn.Module, name: str, config: Any) -> Any:
    """The configuration of an adapter, with the ranks and alphas that its layers have where it says others.

    `prepare_model_for_compiled_hotswap` may have set its ranks to those of the room.
    """
    if config.peft_type != "LORA":
        return config
    alike = not tables(config)
    held = [layer.adapters.get(name) for layer in hosts(model) if isinstance(layer, BaseTunerLayer)]
    plain = [p.__dict__ for p in held if p is not None and "r" in p.__dict__]
    if alike and all(p["r"] == config.r and p["lora_alpha"] == config.lora_alpha for p in plain):
        return config
    found = {
        p.path: (int(p.r), p.lora_alpha)
        for _, layer in tuner_layers(model)
        if isinstance(layer, BaseTunerLayer) and (p := layer.adapters.get(name)) is not None and "r" in p.__dict__
    }
    said = {path: config if alike else settings(config, path) for path in found}
    if all((said[path].r, said[path].lora_alpha) == pair for path, pair in found.items()):
        return config
    new = copy.copy(config)
    new.r, new.lora_alpha = Counter(found.values()).most_common(1)[0][0]
    for i, (field, usual) in enumerate((("rank_pattern", new.r), ("alpha_pattern", new.lora_alpha))):
        own = special({path: pair[i] for path, pair in found.items()}, usual)
        setattr(new, field, {"^" + re.escape(path): value for path, value in own.items()})
    return new
