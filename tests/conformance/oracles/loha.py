"""LoHa, with plain factors and with Tucker cores."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import LoHaConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix

FIELDS = {"r": 3, "alpha": 5}


@on_matrix
def loha(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    if "hada_t1" not in t:
        return W + (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * 5 / 3
    r = len(t["hada_w1_a"])
    first, second = (
        sum(
            torch.outer(
                t[f"hada_w{i}_a"][u], torch.outer(t[f"hada_w{i}_b"][v], t[f"hada_t{i}"][u, v].flatten()).flatten()
            )
            for u in range(r)
            for v in range(r)
        )
        for i in (1, 2)
    )
    return W + first * second * 5 / 3


ROWS = {
    "loha": Row(LoHaConfig, FIELDS, loha, prefix="hada_", noise=0.6),
    "loha-effective": Row(
        LoHaConfig, {**FIELDS, "use_effective_conv2d": True}, loha, prefix="hada_", noise=0.6, few=False
    ),
}
