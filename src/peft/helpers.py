"""Small tools for models with adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import update_wrapper
from types import MethodType
from typing import Any

from torch import nn

from . import lazy
from .config import PeftConfig
from .core.contexts import Open, Opened
from .core.kept import KEEPING
from .core.layer import BaseTunerLayer

_NAMES = {
    "peft.algebra.scale": "rescale_adapter_scale",
    "peft.core.kappa": "KappaTuneSelector find_kappa_target_modules",
    "peft.methods.lora.layer": "LoraLayer",
    "peft.methods.lora.model": "LoraModel",
    "peft.methods.lora.monteclora": "MontecloraTrainerMixin",
    "peft.model": "PeftModel",
}
__getattr__, __dir__, _later = lazy.names(__name__, _NAMES)
__all__ = [
    *_later,
    "DoraCaching",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]

_uncast: Open[bool] = Open()
_kept: Open[bool] = Open()
METHODS = ("forward", "generate", "all")


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or a repository holds an adapter; False also if that cannot be found out."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # any failure means: no adapter that could be used
        return False
    return True


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside the block inputs keep their dtype instead of being cast to the adapter's.

    Arguments:
        model: a model with adapter layers.
        active: False does nothing.
    """
    if not active:
        yield
        return
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    mine = _uncast.enter(BaseTunerLayer, {layer: layer.cast_input_dtype_enabled for layer in layers})
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        later = _uncast.leave(BaseTunerLayer, mine)
        for layer, enabled in mine.found.items():
            after = next((other for other in later if layer in other.found), None)
            if after is None:
                layer.cast_input_dtype_enabled = enabled
            else:
                after.found[layer] = enabled


def update_forward_signature(model: Any) -> None:
    """Give `model.forward` the base model's signature and documentation, if it takes *args, **kwargs."""
    _copy_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Give `model.generate` the base model's signature and documentation, if it takes *args, **kwargs."""
    _copy_signature(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Give methods of a PeftModel the signatures of the base model's.

    Arguments:
        model: the PeftModel.
        method: "forward", "generate" or "all".

    Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method} is not supported please choose one of {list(METHODS)}")
    for name in ("forward", "generate") if method == "all" else (method,):
        _copy_signature(model, name)


def _copy_signature(model: Any, name: str) -> None:
    own = getattr(model, name)
    kinds = {p.kind for p in inspect.signature(own).parameters.values()}
    if not kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return
    original = getattr(model.get_base_model(), name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self), name)(self, *args, **kwargs)

    update_wrapper(call, getattr(type(model), name, original), assigned=("__module__", "__qualname__", "__name__"))
    call.__doc__ = original.__doc__
    call.__annotations__ = copy(getattr(original, "__annotations__", {}))
    call.__signature__ = inspect.signature(original.__func__)  # type: ignore[attr-defined]
    object.__setattr__(model, name, MethodType(call, model))


class DoraCaching:
    """Whether evaluation keeps what it computes from an adapter's tensors, DoRA's norms among it: it does by itself.

    In a `with` statement it holds for the block; called, from then on.

    Arguments:
        enabled: False computes everything in each forward.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.mine: list[Opened[bool]] = []

    def __enter__(self) -> None:
        self.mine.append(_kept.enter(KEEPING, {"on": KEEPING.on}))
        KEEPING.on = self.enabled

    def __exit__(self, *error: Any) -> None:
        mine = self.mine.pop()
        if later := _kept.leave(KEEPING, mine):
            later[0].found = mine.found
        else:
            KEEPING.on = mine.found["on"]

    def __call__(self, enabled: bool = True) -> None:
        KEEPING.on = enabled
