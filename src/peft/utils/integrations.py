"""Helpers around DeepSpeed, accelerate and quantised weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..lazy import announce

announce(__name__)


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers runs under DeepSpeed ZeRO-3, where parameters are spread over the ranks."""
    import sys

    if "transformers" not in sys.modules:
        return False
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter],
    modifier_rank: int | None = 0,
    fwd_module: nn.Module | None = None,
) -> Iterator[None]:
    """The whole parameters inside the block, if ZeRO-3 has spread them; else nothing happens.

    Arguments:
        param: one or several parameters.
        modifier_rank: the rank whose changes count; None for reading only.
        fwd_module: the module whose forward is running.
    """
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Modules made inside the block have their parameters on the meta device.

    Arguments:
        include_buffers: buffers too.
    """
    if include_buffers:
        with torch.device("meta"):
            yield
        return
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Which of bitsandbytes' quantised parameters this is; False for any other."""
    kind = type(param).__name__
    if kind == "Params4bit":
        return "4bit"
    return "8bit" if kind == "Int8Params" else False


def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> Tensor:
    """The numbers of a weight of bitsandbytes.

    Arguments:
        weight: a `Params4bit` or `Int8Params`.
        state: of the latter's module, which holds the scales once the module has run.

    Raises ValueError for any other weight, and for an 8-bit one whose scales are neither in it nor in `state`.
    """
    from ..core import storage

    holder: Any = nn.Module()
    holder.weight, holder.state = weight, state
    kind = storage.packed(holder, "weight") if get_bnb_param_type(weight) else None
    if kind is None:
        raise ValueError(f"weight must be a quantised one of bitsandbytes, got {type(weight).__name__}.")
    scales = getattr(weight, "SCB", None), getattr(state, "SCB", None)
    if get_bnb_param_type(weight) == "8bit" and all(s is None for s in scales):
        raise ValueError("This 8-bit weight has no scales of its own: pass state=module.state.")
    return kind.read(holder, "weight")


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """The weight of a module as an ordinary parameter: itself, or for a quantised one its numbers.

    Raises NotImplementedError for weights that cannot be read.
    """
    from ..core import storage

    if storage.packed(module, "weight") is None:
        return module.weight  # type: ignore[return-value]
    weight: Any = getattr(module, "weight", None)
    try:
        return nn.Parameter(storage.of(module, "weight").read(module, "weight"), requires_grad=False)
    except (AttributeError, TypeError) as error:
        raise NotImplementedError(
            f"The weight of {type(module).__name__} ({type(weight).__name__}) cannot be read as numbers."
        ) from error
