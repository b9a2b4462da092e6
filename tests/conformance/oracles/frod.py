"""FRoD: the whole of U (S + diag(l)) V' in place of the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft import FrodConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, adding


def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
    p = layer.adapters[name]
    V, at = (getattr(p, f"frod_{what}.{p.category}") for what in ("V", "s_indices"))
    V = V.double()

    @adding
    def replaced(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
        turned = isinstance(layer.get_base_layer(), nn.Embedding)
        M = M.mT if turned else M
        U = torch.linalg.solve(V, M.mT).mT
        U = U / U.norm(dim=-2, keepdim=True)
        S = torch.diag_embed(t["frod_lambda_l"])
        for k, (i, j) in enumerate(at.mT.tolist()):
            one = torch.zeros(V.shape, dtype=V.dtype)
            one[i, j] = 1.0
            S = S + t["frod_lambda_s_values"][..., k, None, None] * one
        D = U @ S @ V.mT - M
        return D.mT if turned else D

    return replaced(layer, name, W, original)


FIELDS = {"sparse_rate": 0.3, "progressbar": False, "projection_prng_key": 3}
ROWS = {"frod": Row(FrodConfig, FIELDS, weight, prefix="frod_")}
