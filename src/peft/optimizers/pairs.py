"""Which parameters of a model are the two factors of one update."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..core.layer import BaseTunerLayer, tuner_layers


class Pair(NamedTuple):
    """A (r, in) and B (out, r) of one adapter in one layer, whose product is multiplied by `scaling`."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    names: tuple[str, str]


def pairs(model: nn.Module, embeddings: bool = False) -> list[Pair]:
    """Every pair of factors below a model that are matrices, in the order of the layers.

    Arguments:
        model: a model with LoRA adapters.
        embeddings: those of embeddings, too.
    """
    named = {id(p): name for name, p in model.named_parameters()}
    kinds = ("lora_", "lora_embedding_") if embeddings else ("lora_",)
    found = []
    for _, layer in tuner_layers(model):
        adapters: dict[str, Any] = layer.adapters if isinstance(layer, BaseTunerLayer) else {}
        for p, kind in ((p, kind) for p in adapters.values() for kind in kinds):
            if not (p.has(f"{kind}A") and p.has(f"{kind}B")):
                continue
            A, B = (getattr(t, "weight", t) for t in (getattr(p, f"{kind}A"), getattr(p, f"{kind}B")))
            if A.dim() == B.dim() == 2 and id(A) in named and id(B) in named:
                found.append(Pair(A, B, float(getattr(p, "scaling", 1.0)), (named[id(A)], named[id(B)])))
    return found
