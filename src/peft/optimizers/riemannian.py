"""Gradients of A and B measured on the manifold of low-rank matrices, before any optimiser's step.

    G_A  <-  (B'B + reg I)^-1 G_A,    G_B  <-  G_B (A A' + reg I)^-1

so that a step does not depend on how a product B A is split into its factors. Source: Zhang and Pilanci 2024, arXiv
2402.02347, eq. 1-2.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .pairs import Pair, pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 0.01, **kwargs: Any
) -> Optimizer:
    """An optimiser of this class whose steps see preconditioned gradients of A and B.

    Arguments:
        model: a model with LoRA adapters; its trainable parameters are optimised.
        optimizer_cls: the optimiser's class, such as torch.optim.AdamW.
        lr: the rate.
        reg: added to the diagonal of both Gram matrices.
        kwargs: further arguments of the optimiser.

    Raises TypeError for a class that is no optimiser, ValueError for one that needs a closure, without pairs of
    factors, and for a negative `reg`.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{optimizer_cls.__name__} computes the loss again in each step, so its gradients cannot be "
                         "preconditioned before. Use an optimiser without a closure, such as AdamW.")  # fmt: skip
    if reg < 0:
        raise ValueError(f"`reg` must be at least 0, got {reg}.")
    found = [pair for pair in pairs(model) if pair.A.requires_grad and pair.B.requires_grad]
    if not found:
        raise ValueError("The model has no trainable pair of lora_A and lora_B. Add a LoRA adapter, and activate it.")

    class RiemannianPreconditionedOptimizer(optimizer_cls):  # type: ignore[misc, valid-type]
        """The wrapped optimiser after the preconditioning."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if closure is not None:
                raise ValueError(
                    "A closure would compute the gradients anew, after they are preconditioned. Call backward() before "
                    "step(), without a closure."
                )
            precondition(found, reg)
            return super().step()

    parameters = [p for p in model.parameters() if p.requires_grad]
    return RiemannianPreconditionedOptimizer(parameters, lr=lr, **kwargs)


@torch.no_grad()
def precondition(found: list[Pair], reg: float) -> None:
    """Change the gradients of the pairs in place; both from the factors as they are now."""
    for pair in found:
        A, B = pair.A.float(), pair.B.float()
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        if pair.A.grad is not None:
            pair.A.grad.copy_(_inverse(B.mT @ B + reg * eye) @ pair.A.grad.float())
        if pair.B.grad is not None:
            pair.B.grad.copy_(pair.B.grad.float() @ _inverse(A @ A.mT + reg * eye))


def _inverse(gram: Tensor) -> Tensor:
    return torch.linalg.pinv(gram, hermitian=True)
