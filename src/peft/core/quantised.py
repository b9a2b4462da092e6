"""A low-rank update over a quantised linear layer as one node of the graph, as `kernels.thin` has it for a dense one.

The product is the library's own. For the gradient of the input the weight is read once more, and that gradient is
summed within the product; what is kept is the input, as an adapter's gradient needs it, and tensors of rank size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import choice, masks, thin
from ..kernels.again import differentiable
from ..kernels.lowrank import raised
from ..kernels.modes import eager, node
from .direct import EVERYWHERE
from .storage import Packed, wider

if TYPE_CHECKING:
    from .method import LowRank
    from .stack import Adapter, Stack


def beside(method: LowRank, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
    """W x + b + s B A dropout(x) where A learns, on a CPU; None where plain operations have to do it.

    Arguments:
        method: of the adapter p, which has no more to it than A, B, s and the dropout.
        inner: what the adapter stands on.
        x: (..., d).
    """
    if not torch.is_grad_enabled() or not eager() or "cpu" in choice.devices or not _is_open(inner):
        return None
    if method.up_bias(p) is not None:
        return None
    (A, B), scale = method.factors(p), method.scaling(p)
    fits = A.requires_grad and A.dim() == 2 and thin.takes(x, A, B, scale)
    return _linear(x, A, B, scale, method.drop_rate(p), inner) if fits else None


def _is_open(inner: Stack) -> bool:
    """Whether this is a quantised linear layer and nothing else, its bias frozen."""
    if inner.last is not None or inner.extra is not None or inner.gated or not isinstance(inner.packed, Packed):
        return False
    base, view = inner.layer._modules["base_layer"], inner.view
    if view.label != "Linear" or not view.dense or not _alone(base):
        return False
    b = view.bias(base)
    return b is None or not b.requires_grad


def _alone(base: nn.Module) -> bool:
    """Whether nothing but this library stands between a module's input and its output."""
    if base._modules or "forward" in base.__dict__ or base._backward_hooks or base._backward_pre_hooks:
        return False
    if any(EVERYWHERE):
        return False
    hooks = (*base._forward_hooks.values(), *base._forward_pre_hooks.values()) if _hooked(base) else ()
    return all(getattr(hook, "__module__", "").startswith(f"{__package__.partition('.')[0]}.") for hook in hooks)


def _hooked(base: nn.Module) -> bool:
    return bool(base._forward_hooks or base._forward_pre_hooks)


class _Linear(torch.autograd.Function):
    """W x + b + scale B A dropout(x), W x + b as the library gives it; saves x, the mask and h = A dropout(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, inner: Stack) -> Tensor:
        ctx.scale, ctx.inner = scale / (1.0 - p), inner
        y = inner(x)
        h, bits = thin.down(x.reshape(-1, x.shape[-1]), A, p)
        ctx.save_for_backward(x, A, B, h if ctx.needs_input_grad[2] else None, bits)
        return raised(y.reshape(-1, y.shape[-1]), h, B, ctx.scale, True).view(y.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, bits = ctx.saved_tensors
        needs, scale, inner = ctx.needs_input_grad, ctx.scale, ctx.inner
        if torch.is_grad_enabled():
            mask, W = masks.unpacked(bits, x.shape, A.dtype), _dense(inner)

            def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
                kept = x.to(A.dtype) if mask is None else x.to(A.dtype) * mask
                base = F.linear(x.to(kind := wider(x.dtype, W.dtype)), W.to(kind))
                return (base + F.linear(F.linear(kept, A), B) * scale).to(grad.dtype)

            return *differentiable(plain, (x, A, B), needs[:3], grad), None, None, None
        g = grad.reshape(-1, grad.shape[-1])
        back, of_B = thin.of_h(g, B, h, scale)
        found, of_A = thin.of_x(back, x.reshape(-1, x.shape[-1]), bits, A, x.dtype if needs[0] else None)
        return None if found is None else _with_base(found, g, inner).view(x.shape), of_A, of_B, None, None, None


def _dense(inner: Stack) -> Tensor:
    return inner.view.matrix(inner.base, inner.packed.read(inner.base, inner.view.name))


def _with_base(found: Tensor, g: Tensor, inner: Stack) -> Tensor:
    """A gradient of x, (N, d), with what comes through W added to it."""
    part = inner.packed.pull(inner.base, inner.view.name, g)
    if part is None:
        W = _dense(inner)
        if W.dtype is g.dtype is found.dtype:
            return found.addmm_(g, W)
        compute = wider(g.dtype, W.dtype)
        part = g.to(compute) @ W.to(compute)
    return found.add_(part.to(found.dtype))


_linear = node(_Linear)
