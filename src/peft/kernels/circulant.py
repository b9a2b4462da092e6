"""Products with a matrix of circulant blocks, by way of their frequencies.

Letters: x (..., v b) in v parts of b features, K (u, v, b) the kernels, y (..., u b). Each block turns its kernel:

    y[u, i] = sum over v, j of x[v, j] K[u, v, j - i],   of their transforms  Y[u] = sum over v of X[v] conj(K[u, v])

The transform of x, twice as many numbers as x has, is made again in the backward pass rather than kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .again import batched, differentiable
from .modes import node, transformed, without_autocast


def product(x: Tensor, K: Tensor, s: float) -> Tensor:
    """y times s, in the dtype of K, which is single precision or more."""
    if transformed() or not torch.is_grad_enabled() or type(x) is not Tensor:
        return plain(x, K, s)
    with without_autocast(x):
        return _product(x, K, s)


def plain(x: Tensor, K: Tensor, s: float) -> Tensor:
    """The definition."""
    return _features(_waves(x, K) @ (torch.fft.rfft(K) * s).conj().permute(2, 1, 0), K, x)


def _waves(x: Tensor, K: Tensor) -> Tensor:
    """The transforms of an input's parts, (f, N, v): a product of matrices for each frequency meets them."""
    b = K.shape[-1]
    return torch.fft.rfft(x.to(K.dtype).reshape(-1, x.shape[-1] // b, b)).permute(2, 0, 1)


def _features(waves: Tensor, K: Tensor, x: Tensor) -> Tensor:
    """What has these transforms, (f, N, v), in the shape of x but for its features."""
    return torch.fft.irfft(waves.permute(1, 2, 0), n=K.shape[-1]).reshape(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """Saves x and K."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, K: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, K)
        ctx.like, ctx.dtype, ctx.scale = x.shape, x.dtype, s
        return plain(x, K, s)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, K = ctx.saved_tensors
        needs, kind, s = ctx.needs_input_grad, ctx.dtype, ctx.scale
        if torch.is_grad_enabled() or batched(grad):
            if x is None:  # the gradient of x does not hang on its numbers
                x = grad.new_zeros(ctx.like, dtype=kind)
            return (*differentiable(lambda x, K: plain(x, K, s), (x, K), needs[:2], grad), None)
        G = _waves(grad, K)
        of_x = _features(G @ (torch.fft.rfft(K) * s).permute(2, 0, 1), K, grad).to(kind) if needs[0] else None
        of_K = None
        if x is not None:
            of_K = torch.fft.irfft((G.mT.conj() @ _waves(x, K)).permute(1, 2, 0), n=K.shape[-1]).mul_(s)
        return of_x, of_K, None


_product = node(_Product)
