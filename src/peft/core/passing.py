"""Quantised layers at which no adapter stands, or none that is active: gradients pass through them all the same.

Some libraries' products cannot be differentiated, or lose the gradient without a word, so that nothing below such a
layer would learn. Each gets a hook that gives its output the gradient of W x for the dense W; it does nothing where no
gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import storage, views
from .host import below
from .storage import Applied, Packed


def let_through(modules: list[nn.Module]) -> bool:
    """Prepare every quantised layer among the modules of a model, adapted or not; whether any was not yet."""
    new = False
    for module, kind in packed_layers(modules):
        before = len(module._forward_pre_hooks) + len(module._forward_hooks)
        kind.adopt(module)
        if not kind.trains and _pass not in module._forward_hooks.values():
            module.register_forward_hook(_pass)
        new |= len(module._forward_pre_hooks) + len(module._forward_hooks) > before
    return new


def let_go(model: nn.Module) -> None:
    """Take back what `let_through` did."""
    for module, kind in packed_layers(below(model)[0]):
        kind.release(module)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _pass:
                del module._forward_hooks[key]


def packed_layers(modules: list[nn.Module]) -> Iterator[tuple[nn.Module, Packed]]:
    """The layers whose weight is quantised, and its storage."""
    kinds = {(type(m), type(m._parameters.get("weight"))) for m in modules}  # few, where modules are many
    packed = {pair: kind for pair in kinds if isinstance(kind := _by_classes(*pair), Packed)}
    for module in modules if packed else ():
        kind = packed.get((type(module), type(module._parameters.get("weight"))))
        if kind is not None and storage.of(module, "weight") is kind:
            yield module, kind


def _by_classes(module: type, weight: type) -> storage.Storage | None:
    """The storage that a layer and its weight have by their classes."""
    kind = storage.by_class(module)
    if kind is None:  # what has no weight is asked of no library
        return None if weight is type(None) else storage.by_class(weight)
    return kind if "weight" in kind.weights else None


def _pass(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    x = args[0] if args else None
    if not (torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad and isinstance(output, Tensor)):
        return None
    view = views.view_of(module)
    kind = storage.of(module, view.name)
    return Applied.apply(x, None, lambda *_: output.detach(), view, module, kind) if kind.packed else None
