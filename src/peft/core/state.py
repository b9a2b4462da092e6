"""The adapters of any model, with or without a tuner around it: switched off for a while, and their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import nearest
from .layer import tuner_layers


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model's output while the context is open. Nests, and restores every layer as it was, also after errors.

    Layers that are placed meanwhile are left as the others were.
    """
    before = {layer: layer.disable_adapters for _, layer in tuner_layers(model)}
    try:
        for layer in before:
            layer._set_disabled(True)
        yield
    finally:
        now = {layer: all(before.values()) for _, layer in tuner_layers(model)} if before else {}
        for layer, was in {**now, **before}.items():
            layer._set_disabled(was)


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
        raise ValueError(f"There is no adapter {name!r}.{nearest(name, known)} The model has {sorted(known)}.")
    return found
