"""Updates that are a sum of low-rank terms: each acts on activations, so that no factors are put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import lowrank, onto
from .direct import open_linear

if TYPE_CHECKING:
    from .stack import Stack

Term = tuple[Tensor, Tensor, Any]  # (A, B, g): B diag(g) A, or g B A for a number g


def summed(inner: Stack, x: Tensor, terms: Sequence[Term]) -> Tensor | None:
    """W x + b + the sum of the terms, over a plain linear layer; None elsewhere.

    In training, factors of another dtype than the layer's are left to a node that keeps x as it is.
    """
    held = open_linear(inner, x)
    alike = all(A.dtype is x.dtype is B.dtype for A, B, _ in terms)
    return None if held is None or not (alike or not torch.is_grad_enabled()) else over(x, *held, terms)


def over(x: Tensor, W: Tensor, b: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """The same where that is known."""
    if len(terms) == 1 and type(terms[0][2]) is float:
        return lowrank.linear(x, W, b, *terms[0])
    flat, made = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])), []
    for A, B, gain in terms:
        h = F.linear(flat if flat.dtype is A.dtype else flat.to(A.dtype), A)
        if isinstance(gain, Tensor) and gain.dim():
            h, gain = h * gain, 1.0
        made.append((h, B.mT, gain))
    return onto.thin(x, W, b, *made)
