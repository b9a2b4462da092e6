"""PEANuT: the network column by column, without and with hidden layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import PeanutConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, adding

SCALING = 1.5


def network(depth: int, f: Any) -> Any:
    @adding
    def update(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
        def weights(name: str) -> list[Tensor]:
            return [t[f"peanut_{name}.{k}.weight"].mT for k in range(depth)]

        Z = f(W.mT @ t["peanut_A.weight"].mT)
        passed = [Z]
        for E in weights("encoders"):
            Z = f(Z @ E)
            passed.append(Z)
        for k, D in enumerate(weights("decoders")):
            Z = f(Z @ D) + passed[depth - 1 - k]
        return SCALING * (Z @ t["peanut_B.weight"].mT).mT

    return update


def row(depth: int, name: str, f: Any, few: bool = False) -> Row:
    fields = {"r": 3, "depth": depth, "act_fn": name, "scaling": SCALING}
    return Row(PeanutConfig, fields, network(depth, f), prefix="peanut_", few=few)


ROWS = {"peanut": row(1, "tanh", torch.tanh, few=True), "peanut-deep": row(2, "gelu", torch.nn.functional.gelu)}
