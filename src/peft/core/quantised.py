"""A low-rank update over a quantised linear layer as one node of the graph, as `kernels.thin` has it for a dense one.

The product is the library's own. For the gradient of the input the weight is read once more, and that gradient is
summed within the product; what is kept is the input, as an adapter's gradient needs it, and tensors of rank size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import choice, lowrank, masks, narrow, thin
from ..kernels.again import batched, differentiable
from ..kernels.modes import eager, node, shaped
from .direct import EVERYWHERE, FORWARD
from .kept import kept_factors
from .storage import Packed, wider

if TYPE_CHECKING:
    from .method import LowRank
    from .stack import Adapter, Stack


def beside(method: LowRank, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
    """W x + b + s B A dropout(x) where A learns, or nothing does, on a CPU; None where plain operations have to do it.

    Arguments:
        method: of the adapter p, which has no more to it than A, B, s and the dropout.
        inner: what the adapter stands on.
        x: (..., d).
    """
    if not x.is_cpu or not eager() or "cpu" in choice.devices:
        return None
    if not torch.is_grad_enabled():
        return _evaluated(method, p, inner, x)
    if not _is_open(inner) or method.up_bias(p) is not None:
        return None
    (A, B), scale, rate = method.factors(p), method.scaling(p), method.drop_rate(p)
    if A.requires_grad and A.dim() == 2 and thin.takes(x, A, B, scale):
        return _linear(x, A, B, scale, rate, inner)
    return lowrank.add(inner(x), x, A, B, scale, rate)  # factors may be dear, and are not made twice


def _evaluated(method: LowRank, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
    """The same where no gradient is wanted, of a base that may be more than that layer."""
    scale = method.scaling(p)
    if method.drop_rate(p) or type(scale) is not float or not inner.view.dense or method.up_bias(p) is not None:
        return None
    (A, B), y = kept_factors(method, p), inner(x)
    if type(y) is not Tensor or y.dtype is not x.dtype or A.dim() != 2 or not thin.takes(x, A, B, scale):
        return lowrank.add(y, x, A, B, scale)
    return narrow.one(y, x, A, B, scale) if x.numel() == x.shape[-1] else narrow.beside(y, x, A, B, scale)


def _is_open(inner: Stack) -> bool:
    """Whether this is a quantised linear layer and nothing else, its bias frozen."""
    if inner.last is not None or inner.extra is not None or inner.gated or not isinstance(inner.packed, Packed):
        return False
    base = inner.layer._modules["base_layer"]
    if inner.view.label != "Linear" or not inner.view.dense or not _is_the_library_s(base, inner.packed):
        return False
    return not any(q is not None and q.requires_grad for q in base._parameters.values())


def _is_the_library_s(base: nn.Module, kind: Packed) -> bool:
    """Whether calling a module is the library's product or torch's, with no hooks but those of this library."""
    if base._modules or "forward" in base.__dict__ or base._backward_hooks or base._backward_pre_hooks:
        return False
    if any(EVERYWHERE):
        return False
    stated = type(base).forward
    if stated is not FORWARD and _package(stated) not in {name.partition(".")[0] for name in kind.names}:
        return False
    hooks = (*base._forward_hooks.values(), *base._forward_pre_hooks.values())
    return all(_package(hook) == __package__.partition(".")[0] for hook in hooks)


def _package(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").partition(".")[0]


class _Linear(torch.autograd.Function):
    """W x + b + scale B A dropout(x), W x + b as the library gives it; saves x, the mask and h = A dropout(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, inner: Stack) -> Tensor:
        ctx.scale, ctx.inner = scale * masks.share(p), inner
        y = inner(x)
        h, bits = thin.down(x.reshape(-1, x.shape[-1]), A, p)
        ctx.save_for_backward(x, A, B, h if ctx.needs_input_grad[2] else None, bits)
        return shaped(lowrank.raised(y.reshape(-1, y.shape[-1]), h, B, ctx.scale, True), y.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, bits = ctx.saved_tensors
        needs, scale, inner = ctx.needs_input_grad, ctx.scale, ctx.inner
        if torch.is_grad_enabled() or batched(grad):
            mask, W = masks.unpacked(bits, x.shape, A.dtype), _dense(inner)

            def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
                base = F.linear(x.to(kind := wider(x.dtype, W.dtype)), W.to(kind))
                return lowrank.plain(base, x if mask is None else x.to(A.dtype) * mask, A, B, scale).to(grad.dtype)

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
        compute = g.dtype if inner.packed.trains else wider(g.dtype, W.dtype)  # as the library does, if it does it
        if compute is g.dtype is found.dtype:
            return found.addmm_(g, W.to(compute))
        part = g.to(compute) @ W.to(compute)
    return found.add_(part.to(found.dtype))


_linear = node(_Linear)
