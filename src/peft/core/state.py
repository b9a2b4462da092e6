"""The adapters of any model, with or without a tuner around it: switched off for a while, and their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import PeftWarning, check_adapters, report
from .contexts import Open
from .layer import tuner_layers

_open: Open[bool | None] = Open()
EVERY = object()  # in place of a layer: all of a roster, which are alike; None where each is by itself


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model's output while the context is open. Nests, and restores every layer as it was, also after errors.

    Of several that are open at a time, in whatever order they are left, the last one restores. Layers that are placed
    meanwhile are left as the others were.
    """
    (roster, call), owner = _alike(model), model._modules.get("base_model", model)
    every = None if roster is None else call.disabled
    found = roster.others if roster is not None else [layer for _, layer in tuner_layers(model)]
    before: dict[Any, bool] = {layer: layer.disable_adapters for layer in found}  # of a wrapper, what its layer says
    mine = _open.enter(owner, {EVERY: every, **before}, (roster, call))
    try:
        if roster is not None:
            call.disabled = True
            call.switch(roster.layers, off=True)
        for layer in found:
            layer._set_disabled(True)
        yield
    finally:
        if later := _open.leave(owner, mine):
            later[0].found, later[0].did = mine.found, mine.did
        else:
            roster, call = mine.did
            _restore(model, roster, call, mine.found.pop(EVERY), mine.found)


def _restore(model: nn.Module, roster: Any, call: Any, every: bool | None, before: dict[Any, Any]) -> None:
    if roster is not None and roster.current and call.disabled and not call.merged:
        call.disabled = every
        call.switch(roster.layers, off=every)
        now = {}
    else:
        rest = all(before.values()) if every is None else every
        now = {layer: rest for _, layer in tuner_layers(model)} if before or every is not None else {}
    for layer, was in {**now, **before}.items():
        layer._set_disabled(was)
    if call is not None and now and not any(layer.disable_adapters for layer in now):
        call.disabled = False


def _alike(model: nn.Module) -> tuple[Any, Any]:
    """The roster and the call record of a model whose layers are switched off and on together, if they can be."""
    tuner = model if hasattr(type(model), "roster") else model._modules.get("base_model")
    call = None if tuner is None else tuner.__dict__.get("call")
    if call is None:
        return None, None
    alone = "prompts" in model.__dict__ or not hasattr(type(tuner), "roster")
    if alone or call.disabled is None or call.merged:
        return None, None if alone else call
    return tuner.roster(), call  # type: ignore[union-attr,operator]


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """{name in the model: parameter} of one adapter.

    Arguments:
        model: a PeftModel, a tuner, or a model with injected layers.
        name: the adapter's name.

    Raises ValueError if no layer has it.
    """
    found: dict[str, nn.Parameter] = {}
    known: set[str] = set()
    for path, layer in tuner_layers(model):
        known |= layer._get_available_adapters()
        named = layer.named(name) if hasattr(type(layer), "named") else {s.live: s.tensor for s in layer.slots(name)}
        for live, tensor in named.items():
            if isinstance(tensor, nn.Parameter):
                found[f"{path}.{live}" if path else live] = tensor
    if not found:
        check_adapters([name], known - {name})
    return found


def warn_of_idle_training(model: nn.Module) -> None:
    """Warn if a model that is made ready for training has nothing to train: inputs with gradients hide that."""
    if not any(p.requires_grad for p in model.parameters()):
        report(
            PeftWarning,
            "No parameter of the model requires gradients, so training it changes nothing: adapters are loaded frozen, "
            "unless with is_trainable=True. set_adapter(name) makes one trainable, too.",
        )
