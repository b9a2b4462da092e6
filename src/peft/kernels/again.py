"""Gradients of gradients, for operations whose backward pass is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_several = torch._C._functorch.is_legacy_batchedtensor


def batched(grad: Tensor) -> bool:
    """Whether a gradient is several at once (`is_grads_batched=True`, `jacobian(vectorize=True)`).

    torch lets those through plain operations alone. In graphs, which compiled autograd makes of a backward pass, there
    are none.
    """
    return not torch.compiler.is_compiling() and _several(grad)


def differentiable(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> Any:
    """The gradients of plain(*inputs) as tensors that can be differentiated again; None where none is needed.

    A backward pass asks for them where one of itself is wanted (`create_graph=True`, which shows as enabled
    gradients): what it would compute by hand holds numbers of the forward pass that have forgotten where they are from.
    It does so, too, for gradients that are `batched`.
    """
    with torch.enable_grad():
        # aliases: a gradient goes to the argument alone, not to what the argument was made of
        args = [t.view_as(t) if t is not None and need else t for t, need in zip(inputs, needs, strict=True)]
        wanted = [t for t, need in zip(args, needs, strict=True) if t is not None and need]
        found = iter(torch.autograd.grad(plain(*args), wanted, grad, create_graph=True))
        return tuple(next(found) if need else None for need in needs)
