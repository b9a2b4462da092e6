"""LoRA+: B learns faster than A.

A starts random and B at zero, so that the same rate for both makes features learn too slowly in wide layers; the rate
of B is `loraplus_lr_ratio` times that of A. Source: Hayou et al. 2024, arXiv 2402.12354, theorem 1.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..core.views import supported, view_of

EIGHT_BIT = frozenset({"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"})


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser with a rate of its own for B.

    Arguments:
        model: a model with LoRA adapters; its trainable parameters are optimised.
        optimizer_cls: the optimiser's class.
        lr: the rate of A and of what is neither A nor B.
        loraplus_lr_ratio: B's rate, as a multiple of `lr`; vectors (biases, norms) have B's rate too.
        kwargs: `loraplus_weight_decay` (0.0), not for biases and norms; `loraplus_lr_embedding` (1e-6), the rate of
            the factors of embeddings; the rest is the optimiser's.

    Raises ValueError if nothing is trainable, or for a ratio that is not positive.
    """
    if loraplus_lr_ratio <= 0:
        raise ValueError(f"`loraplus_lr_ratio` must be greater than 0, got {loraplus_lr_ratio}. The paper uses 16.")
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    parts: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "vector": []}
    norms = tuple(n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm))
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts[_part(name, p, norms)].append(p)
    if not any(parts.values()):
        raise ValueError("The model has no trainable parameters. Activate an adapter with set_adapter first.")
    fast = lr * loraplus_lr_ratio
    groups = [
        {"params": parts["A"], "weight_decay": decay, "lr": lr},
        {"params": parts["embedding"], "weight_decay": decay, "lr": embedding_lr},
        {"params": parts["B"], "weight_decay": decay, "lr": fast},
        {"params": parts["vector"], "weight_decay": 0.0, "lr": fast},
    ]
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]  # which looks at it
    if optimizer_cls.__name__ in EIGHT_BIT:
        _keep_embeddings_exact(model)
    return optimizer


def _part(name: str, p: nn.Parameter, norms: tuple[str, ...]) -> str:
    if "lora_embedding" in name:
        return "embedding"
    if "lora_B" not in name and p.dim() != 1:
        return "A"
    plain = "bias" in name or name.rpartition(".")[0] in norms
    return "vector" if plain else "B"


def _keep_embeddings_exact(model: nn.Module) -> None:
    """Eight-bit states are too coarse for embeddings."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if supported(module) and view_of(module).label == "Embedding":
            manager.register_module_override(module, "weight", {"optim_bits": 32})
