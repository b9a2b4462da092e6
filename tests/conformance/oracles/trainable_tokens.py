"""Trainable tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft import TrainableTokensConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .row import Row, by_input, held

TOKENS = [7, 0, 3]


def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    rows = held(layer, name)["trainable_tokens_delta"]
    turned = by_input(layer) and not isinstance(layer.get_base_layer(), nn.Embedding)
    out = list(W.mT if turned else W)
    for token, row in zip(TOKENS, rows, strict=True):
        out[token] = row
    new = torch.stack(out)
    return new.mT if turned else new


def forbidden(layout: Layout) -> str | None:
    return None if layout.kind in ("linear", "embedding") else "has no tokens"


FIELDS = {"token_indices": TOKENS}
ROWS = {
    "tokens": Row(TrainableTokensConfig, FIELDS, weight, forbidden=forbidden, prefix="trainable_tokens_", alone=True)
}
