"""Where the base layer's product may be computed from its weight, without calling the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import _C, Tensor, nn
from torch.autograd import forward_ad

from ..kernels.thin import WIDE
from ..kernels.whole import touched

if TYPE_CHECKING:
    from .method import Delta
    from .stack import Adapter, Stack

peek_interpreter_stack = _C._functorch.peek_interpreter_stack
FORWARD = nn.Linear.forward
TURNED: dict[type[nn.Module], object] = {}  # classes whose product is with V' for the V they hold, and how they do it
CONVS: dict[type[nn.Module], object] = {kind: kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
EVERYWHERE = tuple(  # hooks of all modules
    getattr(nn.modules.module, f"_global_{name}_hooks", {})
    for name in ("forward_pre", "forward", "backward_pre", "backward")
)


def meet_conv1d(kind: type[nn.Module]) -> None:
    """Note transformers' Conv1D, x V + b, whose product has the bits of F.linear(x, V', b)."""
    home = "transformers.pytorch_utils"
    stated = getattr(kind.forward, "__module__", ""), getattr(kind.forward, "__qualname__", "")
    if kind.__module__ == home and stated == (home, "Conv1D.forward"):  # and nobody's patch of it
        TURNED[kind] = kind.forward


def is_product(base: nn.Module) -> bool:
    """Whether a module is of a class of which calling is F.linear, with its weight as it is or turned."""
    kind = type(base)
    return (FORWARD if kind is nn.Linear else TURNED.get(kind)) is kind.forward


def matrix(base: nn.Module, held: Tensor) -> Tensor:
    """W, (O, I), of such a module, from the weight that it holds."""
    return held if type(base) is nn.Linear else held.mT


def is_ordinary(base: nn.Module) -> bool:
    """Whether calling a module is torch's own product and nothing else: a linear layer, not hooked, not patched."""
    return is_product(base) and _untouched(base)


def is_conv(base: nn.Module) -> bool:
    """The same of a convolution."""
    return type(base) in CONVS and CONVS[type(base)] is type(base).forward and _untouched(base)


def _untouched(base: nn.Module) -> bool:
    if "forward" in base.__dict__ or any(EVERYWHERE):
        return False
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)


def open_linear(inner: Stack, x: Tensor, gated: bool = False) -> tuple[Tensor, Tensor | None] | None:
    """(W, b) if calling the stack with x is F.linear(x, W, b) and nothing else; None where it may be more.

    It is more where the layer is a subclass, is hooked, patched, offloaded or quantised, where other adapters stand on
    it, where the dtypes differ or autocast chooses them, under torch.func and forward-mode differentiation, and in
    traces of torch.jit, which hold definitions alone: they serve training and evaluation, and any number of rows.
    `gated`: whether the shortcut lets the stack `gate` its weight.
    """
    if inner.last is not None or inner.extra is not None or inner.packed is not None or inner.gated is not gated:
        return None
    base = inner.layer._modules["base_layer"]
    kind = type(base)
    if (FORWARD if kind is nn.Linear else TURNED.get(kind)) is not kind.forward:
        return None
    if "forward" in base.__dict__ or any(EVERYWHERE):
        return None  # as `is_ordinary` tells, without calls, which cost more here than what they look at
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    held = base._parameters
    W = held.get("weight")
    if type(W) is not nn.Parameter or W.dtype is not x.dtype or "bias" not in held:  # some libraries take them away
        return None
    if x.dim() < 2 or type(x) not in _KNOWN or x.is_nested:
        return None
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return None
    graph = torch.compiler.is_compiling()
    if not graph and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0 or _C._is_tracing()):
        return None
    return W if kind is nn.Linear else W.mT, held["bias"]


def summed_up(method: Delta, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
    """`method.forward` as one product with W', which costs less than what it does to activations if these are many.

    From how many on says its `sums_from`. None in training, and where calling the layer is more than its product.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu or x.dtype not in WIDE:
        return None
    if x.numel() < LEAST or _C._is_tracing():  # and traces serve other numbers of rows
        return None
    held = open_linear(inner, x)
    if held is None or touched(x, held[0]) < method.sums_from * held[0].numel() or method.drop_rate(p):
        return None
    D = method.delta(p, held[0])
    return F.linear(x, held[0] + D, held[1]) if D.dtype is x.dtype else None


LEAST = 2**14  # numbers in an input, of fewer of which making W' takes longer
_KNOWN = (Tensor, nn.Parameter)
