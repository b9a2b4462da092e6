"""Variants of LoRA that have a weight of their own: KaSA, BD-LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import LoraConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .lora import factors, product, ungrouped
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
    @on_matrix
    def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
        M = {"A": t["lora_A.weight"], "B": t["lora_B.weight"]}
        M[side] = torch.block_diag(*M[side].chunk(BLOCKS))
        return W + ALPHA / 4 * M["B"] @ M["A"]

    return weight


def only_linear(layout: Layout) -> str | None:
    return None if layout.kind == "linear" else "use_bdlora"


def bd_row(side: str) -> Row:
    options = {"nblocks": BLOCKS, f"target_modules_bd_{side.lower()}": [""]}
    fields = {"r": 4, "lora_alpha": ALPHA, "use_bdlora": options}
    return Row(LoraConfig, fields, blocked(side), forbidden=only_linear, few=side == "A")


KASA = {"r": 2, "lora_alpha": ALPHA, "kasa_config": {}}
ROWS = {
    "kasa": Row(LoraConfig, KASA, kasa, identity=False, grouped=False, few=False, alone=True),
    "bdlora-a": bd_row("A"),
    "bdlora-b": bd_row("B"),
}
