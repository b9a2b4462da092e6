"""The mode that new adapters are in: training where they learn, whatever the model is in; evaluation after a load."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from .host import AdapterHost, below, standing
from .layer import BaseTunerLayer


def evaluate(model: nn.Module, new: str | None, found: list[nn.Module] | None = None) -> Callable[[], None]:
    """`model.eval()`, in one walk; what is in evaluation already costs a look at most.

    Arguments:
        model: a model with adapters.
        new: the adapter that has just been added to it; None if there is none.
        found: its modules as `below` gives them, where they are known.

    Returns what puts modules into training again that were.
    """
    was: list[nn.Module] = []

    def undo() -> None:
        for m in was:
            m.__dict__["training"] = True

    try:
        _evaluate(model, new, found, was)
    except BaseException:
        undo()
        raise
    return undo


def _evaluate(model: nn.Module, new: str | None, found: list[nn.Module] | None, was: list[nn.Module]) -> None:
    """`evaluate`; `was` receives the modules that were in training."""
    found = below(model)[0] if found is None else found
    layers = standing(found)
    kinds: dict[Any, bool] = {kind: issubclass(kind, AdapterHost) for kind in set(map(type, found))}
    usual = all(kind.train is (BaseTunerLayer if host else nn.Module).train for kind, host in kinds.items())
    if new is None or not usual or not all(isinstance(m, BaseTunerLayer) for m in layers):
        was += [m for m in model.modules() if m.training]
        model.eval()
        return
    keeping = [layer for layer in layers if layer.training for p in layer.adapters.values() if p.cache]
    was += [m for layer in keeping for m in layer.modules() if m.training]
    for layer in keeping:
        layer.eval()  # which forgets what is kept
    homes = [(x, home) for x in layers for key, home in x._modules.items() if key not in x._below and home is not None]
    inner = [home for layer, home in homes if layer.training]
    still = [home._modules.values() for layer, home in homes if not layer.training]
    inner += [m for modules in still for m in modules if m is not None and m.training]
    was += [m for m in found if m.training]
    for m in found:
        m.__dict__["training"] = False
    for m in inner:  # grows on the way
        was += [m] if m.training else []
        if type(m).train is nn.Module.train:
            m.__dict__["training"] = False
            inner += [child for child in m._modules.values() if child is not None]
        else:
            m.eval()


def learning(tuner: Any, layers: Iterable[BaseTunerLayer], name: str) -> Callable[[], None]:
    """Put an adapter's modules into training, as new modules are, also where the model around them is not.

    A layer that has no other adapter follows; one that has others stays as it is, and the tuner notes that their modes
    may differ. Returns what takes it back.
    """
    found: list[dict[str, Any]] = []
    for layer in layers:
        own = layer.__dict__
        if own["training"]:
            continue
        alone = len(own["adapters"]) == 1
        tuner.modes_differ |= not alone
        found += [own] if alone else []
        for key, home in own["_modules"].items():
            if key in layer._below or home is None:
                continue
            found += [home.__dict__] if alone else []
            new = home.__dict__["_modules"].get(name)
            if new is not None:
                found += [m.__dict__ for m in new.modules()] if new._modules else [new.__dict__]

    def turn(mode: bool) -> None:
        for attributes in found:
            attributes["training"] = mode

    turn(True)
    return partial(turn, False)
