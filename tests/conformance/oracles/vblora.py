"""VB-LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import VBLoRAConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, by_input, held

K = 2


def mixed(logits: Tensor, bank: Tensor) -> Tensor:
    """The mixture of the K vectors with the largest logits."""
    out = torch.zeros(bank.shape[1], dtype=bank.dtype)
    at = logits.argsort(descending=True)[:K]
    total = logits[at].exp().sum()
    for m in at:
        out = out + logits[m].exp() / total * bank[m]
    return out


def update(A: Tensor, B: Tensor, bank: Tensor) -> Tensor:
    rows = torch.stack([torch.cat([mixed(piece, bank) for piece in row]) for row in A])
    columns = torch.stack([torch.cat([mixed(piece, bank) for piece in column]) for column in B.transpose(0, 1)])
    return columns.T @ rows


def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    t: dict[str, Any] = held(layer, name)
    bank = layer.adapters[name].shared["vblora_vector_bank"].tensor(name).double()
    A, B = t["vblora_logits_A"], t["vblora_logits_B"]
    D = update(A, B, bank) if A.dim() == 3 else torch.stack([update(*each, bank) for each in zip(A, B, strict=True)])
    return W + (D.mT if by_input(layer) else D.reshape(W.shape))


FIELDS = {"r": 3, "num_vectors": 5, "vector_length": 2, "topk": K, "init_vector_bank_bound": 1.0}
CHANGES = {"attention": {"vector_length": 1}}  # one of its matrices has 5 in-features
ROWS = {"vblora": Row(VBLoRAConfig, FIELDS, weight, prefix="vblora_", noise=0.5, identity=False, changes=CHANGES)}
