"""The thin convolution of a low-rank update, which keeps its input as it is and bits of a mask.

Letters: x (N, C, ...) in any dtype, A (r, C / groups, kernel) in its own, p the rate of a dropout. The plain form, a
convolution of what dropout leaves of x, keeps that: a copy of x in A's dtype, and a byte of mask for each element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import masks
from .again import batched, differentiable
from .modes import PLAIN, WIDE, is_autocast, node, reused, transformed


class Way(NamedTuple):
    """How a convolution goes over its input: as torch's arguments of these names."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def down(x: Tensor, A: Tensor, p: float, way: Way) -> Tensor | None:
    """A dropout(x), (N, r, ...), in A's dtype; None where plain operations keep as little, or have to do."""
    if not torch.is_grad_enabled() or not (A.requires_grad or x.requires_grad) or not (p or x.dtype is not A.dtype):
        return None
    if type(x) is not Tensor or type(A) not in PLAIN or A.dtype not in WIDE or x.dim() != A.dim() or not x.numel():
        return None
    if not x.is_floating_point() or transformed() or is_autocast(x) or reused():
        return None
    found: Tensor = _down(x, A, p, way)
    return found


def _convolved(x: Tensor, A: Tensor, mask: Tensor | None, p: float, way: Way) -> Tensor:
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[A.dim() - 3]
    found: Tensor = function(_dropped(x, A, mask, p), A, None, *way)
    return found


def _dropped(x: Tensor, A: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """What the dropout leaves of x, in A's dtype."""
    x = x.to(A.dtype)
    return x if mask is None else x * (mask.to(A.dtype) * masks.share(p))


class _Down(torch.autograd.Function):
    """Saves x, A and the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, p: float, way: Way) -> Tensor:
        mask = masks.draw(x.shape, p, x.device) if p else None
        ctx.p, ctx.way = p, way
        ctx.save_for_backward(x, A, masks.packed(mask))
        return _convolved(x, A, mask, p, way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, bits = ctx.saved_tensors
        (need_x, need_A, *_), p, way = ctx.needs_input_grad, ctx.p, ctx.way
        mask = masks.unpacked(bits, x.shape)
        if torch.is_grad_enabled() or batched(grad):
            found = differentiable(lambda x, A: _convolved(x, A, mask, p, way), (x, A), (need_x, need_A), grad)
            return *found, None, None
        z, none = _dropped(x, A, mask, p), [0] * len(way.stride)
        of_x, of_A, _ = torch.ops.aten.convolution_backward(
            grad, z, A, None, *way[:3], False, none, way.groups, (need_x, need_A, False)
        )
        if of_x is not None:
            of_x = (of_x if mask is None else of_x * (mask.to(A.dtype) * masks.share(p))).to(x.dtype)
        return of_x, of_A, None, None


_down = node(_Down)
