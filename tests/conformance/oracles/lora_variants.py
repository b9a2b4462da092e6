"""Variants of LoRA that have a weight of their own: KaSA, BD-LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import LoraConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .lora import dora, factors, lora, product, ungrouped
from .row import Row, held, on_matrix

ALPHA, BLOCKS = 6, 2


def kasa(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    """W without its r least directions, plus s B diag(d) A."""
    A, B = factors(layer, name)
    d = held(layer, name)["lora_diag"].flatten()
    A = A * d.view(-1, *[1] * (A.dim() - 1))
    base: Any = layer.get_base_layer()
    W = W - least(layer, name, original, original)
    return (ungrouped(base, W) if getattr(base, "groups", 1) != 1 else W) + ALPHA / 2 * product(layer, A, B)


@on_matrix
def least(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    U, S, Vh = torch.linalg.svd(W.detach())
    r, n = t["lora_diag"].shape[-1], S.shape[-1]
    return (U[..., n - r : n] * S[..., None, n - r :]) @ Vh[..., n - r : n, :]


def blocked(side: str) -> Any:
    def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
        base: Any = layer.get_base_layer()
        A, B = factors(layer, name)
        if side == "B" and getattr(base, "groups", 1) == BLOCKS:
            pass  # B has the blocks already
        else:
            A, B = (whole(M, layer, kind) if kind == side else M for M, kind in ((A, "A"), (B, "B")))
        return (ungrouped(base, W) if getattr(base, "groups", 1) != 1 else W) + ALPHA / 4 * product(layer, A, B)

    return weight


def whole(M: Tensor, layer: BaseTunerLayer, kind: str) -> Tensor:
    """The factor in full, in the shape that plain LoRA's has: every block for itself, zeros elsewhere."""
    experts = layer.parameter_name is not None and getattr(layer.get_base_layer(), layer.parameter_name).dim() == 3
    E = getattr(layer.get_base_layer(), str(layer.parameter_name)).shape[0] if experts else 1
    n = BLOCKS
    if kind == "A":
        parts = [torch.cat([_alone(b, i, n) for i, b in enumerate(one.chunk(n))]) for one in M.chunk(E)]
        return torch.cat(parts)
    parts = [torch.cat([_alone(b, i, n) for i, b in enumerate(M[:, e::E].chunk(n))]) for e in range(E)]
    return torch.stack(parts, 2).flatten(1, 2) if experts else parts[0]


def _alone(block: Tensor, i: int, n: int) -> Tensor:
    """A block, (rows, columns, ...), with zeros in place of the others beside it."""
    zeros = torch.zeros_like(block)
    return torch.cat([block if j == i else zeros for j in range(n)], 1)


def bd_row(side: str) -> Row:
    options = {"nblocks": BLOCKS, f"target_modules_bd_{side.lower()}": [""]}
    fields = {"r": 4, "lora_alpha": ALPHA, "use_bdlora": options}
    forbidden = odd if side == "A" else Row.forbidden
    return Row(LoraConfig, fields, blocked(side), grouped=False, few=side == "A", forbidden=forbidden)


def odd(layout: Layout) -> str | None:
    return "does not divide 5 in-features" if "separate" in layout.name else None


VELORA = {"r": 4, "lora_alpha": ALPHA, "velora_config": {"num_groups": 3}}
KASA = {"r": 2, "lora_alpha": ALPHA, "kasa_config": {}}
ROWS = {
    "kasa": Row(LoraConfig, KASA, kasa, identity=False, grouped=False, few=False, alone=True),
    "bdlora-a": bd_row("A"),
    "bdlora-b": bd_row("B"),
    "velora-dora": Row(LoraConfig, {**VELORA, "use_dora": True}, dora, grouped=False, few=False),
    "velora": Row(LoraConfig, VELORA, lora, grouped=False, few=False),
}
