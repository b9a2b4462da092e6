"""Keys and values for layers under gradient checkpointing, which transformers gives no cache in training.

The model is given the filled cache all the same, and makes masks and positions from it; but its layers are not. So a
hook stands before each attention module: it puts a cache in the place of the one that the layer was not given, when the
layer runs, and when it runs again in the backward pass. There, what is computed anew must be the same tensors again:

    not reentrant   the graph of the second run is thrown away, so keys and values come from the encoder as leaves
    reentrant       the graph of the second run is used, so they come with theirs, down to the encoder's parameters
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from ..core.call import Call, evaluated
from ..core.past import OF_LAYERS, name_among
from .cache import prefix_cache

OTHERS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")  # it looks at another text


def checkpoints(model: nn.Module) -> bool:
    """Whether the model is trained, and its layers are checkpointed."""
    flag = "is_activation_checkpointing"  # its older name warns
    flag = flag if hasattr(type(model), flag) else "is_gradient_checkpointing"
    return model.training and bool(getattr(model, flag, False))


class Kept:
    """The keys and values of one call. After its forward no tensor is held: they are made again where needed.

    Arguments:
        model: the base model.
        encoder: what makes them.
        rows: the batch.
        cache: as the model is given it.
    """

    def __init__(self, model: nn.Module, encoder: Any, rows: int, cache: Any):
        self.model, self.encoder, self.rows, self.cache = model, encoder, rows, cache
        self.reentrant = False
        self.served: set[int] = set()

    def of_layer(self, i: int) -> Any:
        """A cache for layer i, which may change it."""
        self.served.add(i)
        if evaluated() is None:
            self.reentrant |= not torch.is_grad_enabled()
            return _copied(self.cache, i)
        with torch.set_grad_enabled(self.reentrant):
            cache = prefix_cache(self.model, self.encoder, self.rows)
        if not self.reentrant:
            layer = _attended(cache).layers[i]
            layer.keys, layer.values = (t.detach().requires_grad_(self.learnt) for t in (layer.keys, layer.values))
        return cache

    @property
    def learnt(self) -> bool:
        """Whether the keys and values get a gradient."""
        return any(p.requires_grad for p in self.encoder.parameters())

    def settle(self, output: Any) -> None:
        """The forward is over. Raises ValueError if some layer has not met its keys and values."""
        self.cache = None
        if self.served != set(range(self.encoder.layers)):
            raise ValueError(_unreached(self.model, len(self.served), self.encoder.layers))
        name = name_among(output) if isinstance(output, dict) else None
        if name is not None:
            output[name] = None  # it lacks the text


class Survivor:
    """Stands before each attention module of a model.

    Arguments:
        model: the base model.
        call: the record of the running call, whose `keys` are a `Kept` or None.

    Raises ValueError for a model whose attention modules are not told by their arguments.
    """

    def __init__(self, model: nn.Module, call: Call):
        self.call = call
        decoder: Any = model
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            decoder = model.get_decoder()  # type: ignore[operator]
        found = [m for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int) and _past(_names(m))]
        if not found:
            raise ValueError(_unreached(model, 0, 0))
        self.handles = [m.register_forward_pre_hook(self, with_kwargs=True) for m in found]

    def leave(self) -> None:
        """Stand there no longer."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept: Kept | None = self.call.fact("keys")
        if kept is None:
            return None
        names = _names(module)
        name: Any = _past(names)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        i: Any = module.layer_idx
        if any(given.get(name) is not None for name in OTHERS):
            return None
        if given.get(name) is not None:
            kept.served.add(i)  # this layer is not checkpointed
            return None
        cache, place = kept.of_layer(i), names.index(name)
        if len(args) > place:
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: cache}


def _names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _past(names: list[str]) -> str | None:
    return name_among(names, OF_LAYERS)


def _attended(cache: Any) -> Any:
    """The part of a cache that the text itself is attended to in."""
    return getattr(cache, "self_attention_cache", cache)


def _copied(cache: Any, i: int) -> Any:
    """The cache with a layer i of its own, whose tensors are the same."""
    twin = copy.copy(_attended(cache))
    twin.layers = list(twin.layers)
    twin.layers[i] = copy.copy(twin.layers[i])
    if twin is not cache and hasattr(cache, "self_attention_cache"):
        return type(cache)(twin, type(twin)())
    return twin


def _unreached(model: nn.Module, met: int, layers: int) -> str:
    return (
        f"Gradient checkpointing and keys and values exclude each other in {type(model).__name__}: its checkpointed "
        f"layers take none from outside, and {met} of {layers} attention modules could be found. Call "
        "`gradient_checkpointing_disable()`, or use prompt tuning."
    )
