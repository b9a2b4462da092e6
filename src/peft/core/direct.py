"""Where the base layer's product may be computed from its weight, without calling the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels.lowrank import is_autocast, transformed

if TYPE_CHECKING:
    from .stack import Stack

FORWARD = nn.Linear.forward
EVERYWHERE = tuple(  # hooks of all modules
    getattr(nn.modules.module, f"_global_{name}_hooks", {})
    for name in ("forward_pre", "forward", "backward_pre", "backward")
)


def is_ordinary(base: nn.Module) -> bool:
    """Whether calling a module is torch's own product and nothing else: a linear layer, not hooked, not patched."""
    if type(base) is not nn.Linear or "forward" in base.__dict__ or any(EVERYWHERE) or nn.Linear.forward is not FORWARD:
        return False
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)


def open_linear(inner: Stack, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(W, b) if calling the stack with x is F.linear(x, W, b) and nothing else; None where it may be more.

    It is more where the layer is a subclass, is hooked, patched, offloaded or quantised, where other adapters stand on
    it, where the dtypes differ or autocast chooses them, and under torch.func and forward-mode differentiation.
    """
    if inner.last is not None or inner.extra is not None or inner.packed is not None:
        return None
    base = inner.layer._modules["base_layer"]
    if not is_ordinary(base):
        return None
    W, b = base._parameters.get("weight"), base._parameters.get("bias")
    if type(W) is not nn.Parameter or W.dtype is not x.dtype:
        return None
    if x.dim() < 2 or type(x) not in _KNOWN or x.is_nested or is_autocast(x):
        return None
    return None if transformed() and not torch.compiler.is_compiling() else (W, b)


_KNOWN = (Tensor, nn.Parameter)
