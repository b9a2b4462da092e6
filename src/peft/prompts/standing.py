"""Prompts beside a tuner: one PeftModel with both. The tuner speaks for all adapters then, prompts among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.layer import tuner_layers
from ..registry import tuner_class
from .holder import Prompts

Undo = list[Callable[[], Any]]


def first_prompt(peft_model: Any, model: nn.Module, config: Any, name: str) -> None:
    """Make a prompt the first adapter: `base_model` is the user's model, with no tuner in between."""
    prompts = Prompts(model)
    prompts.peft_config[name] = config
    prompts.inject_adapter(model, name)
    prompts.set_adapter(name, inference_mode=bool(config.inference_mode))
    peft_model.__dict__["prompts"] = prompts
    peft_model.base_model, peft_model.prompt_encoder = model, prompts.encoders


def place(peft_model: Any, name: str, autocast: bool, meta: bool, undo: Undo) -> None:
    """Put an adapter into a model with prompts, or its first prompt: beside the tuner, into it, or into a new one.

    Arguments:
        peft_model: which knows the configuration.
        name: the adapter's name.
        autocast, meta: as `autocast_adapter_dtype` and `low_cpu_mem_usage` of `PeftModel.add_adapter`.
        undo: receives the steps that take it back.
    """
    if peft_model.peft_config[name].is_prompt_learning:
        holder: Any = prompts_of(peft_model, undo)
    elif peft_model.prompts.alone:
        return first_layers(peft_model, name, autocast, meta, undo)
    else:
        holder = peft_model.base_model
    holder.inject_adapter(holder.model, name, autocast_adapter_dtype=autocast, low_cpu_mem_usage=meta, undo=undo)


def prompts_of(peft_model: Any, undo: Undo) -> Prompts:
    """The prompts of a PeftModel, made beside its tuner if there are none yet; `undo` receives what takes them back."""
    known: Prompts | None = peft_model.__dict__.get("prompts")
    if known is not None:
        return known
    tuner = peft_model.base_model
    prompts = Prompts(tuner.model)
    disabled = [layer.disable_adapters for _, layer in tuner_layers(tuner.model)]
    prompts.encoders._set_disabled(bool(disabled) and all(disabled))
    _join(prompts, tuner)
    peft_model.__dict__["prompts"], peft_model.prompt_encoder = prompts, prompts.encoders

    def leave() -> None:
        del peft_model.__dict__["prompts"], peft_model.prompt_encoder, tuner.beside["prompt_encoder"]

    undo.append(leave)
    return prompts


def first_layers(peft_model: Any, name: str, autocast: bool, meta: bool, undo: Undo) -> None:
    """Put a tuner with its first adapter, inactive, between a PeftModel with prompts and the user's model."""
    prompts: Prompts = peft_model.prompts
    model, before = prompts.model, list(tuner_layers(prompts.model))
    held = [p for _, host in before for n in host._get_available_adapters() for p in host.adapter_parameters(n)]
    flags = [(p, p.requires_grad) for p in held]
    kind: Any = tuner_class(prompts.peft_config[name].peft_type)
    tuner = kind(model, prompts.peft_config, name, low_cpu_mem_usage=meta, autocast_adapter_dtype=autocast, undo=undo)
    active, call = prompts.active_adapter, prompts.call
    for _, layer in tuner.layers():
        layer.activate(tuple(prompts.active_adapters))
        layer._set_disabled(prompts.encoders.disable_adapters)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    tuner.active_adapter = active
    _join(prompts, tuner)
    peft_model.base_model = tuner
    peft_model._prepare(model, undo)

    def leave() -> None:
        peft_model.base_model, prompts.alone, prompts.active_adapter = model, True, active
        _share(prompts, call)
        model.__dict__.pop("peft_config", None)

    undo.append(leave)


def _join(prompts: Prompts, tuner: Any) -> None:
    prompts.alone, prompts.peft_config = False, tuner.peft_config
    tuner.beside["prompt_encoder"] = prompts.encoders
    _share(prompts, tuner.call)


def _share(prompts: Prompts, call: Any) -> None:
    """One record of the running call for all."""
    prompts.call = call
    for _, host in tuner_layers(prompts.model):
        host.__dict__["call"] = call
    if prompts.survivor is not None:
        prompts.survivor.call = call
