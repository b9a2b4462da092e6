"""AdaMSS, cluster by cluster; which rows a cluster has is held by the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import AdamssConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, adding, held


def update(t: dict[str, Tensor], places: Tensor) -> Tensor:
    """D, (rows, columns)."""
    order, N = places.argsort(), t["adamss_newB"]
    D = torch.zeros(len(order), N.shape[1], dtype=N.dtype)
    start = 0
    for k in range(sum(key.startswith("adamss_A") for key in t)):
        A, B = t[f"adamss_A.{k}"], t[f"adamss_B.{k}"]
        D = D.index_put((order[start : start + len(B)],), B @ A @ N)
        start += len(B)
    assert start == len(order)
    return D


def row(few: bool = False, **more: Any) -> Row:
    def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
        @adding
        def added(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
            return update(t, layer.adapters[name].adamss_places)[:, : M.shape[-1]].reshape(M.shape)

        return added(layer, name, W, original)

    def bias(layer: BaseTunerLayer, name: str, b: Tensor | None) -> Tensor | None:
        return b if b is None else b + update(held(layer, name), layer.adapters[name].adamss_places)[:, -1]

    fields = {"r": 4, "num_subspaces": 3, "subspace_rank": 2, **more}
    return Row(AdamssConfig, fields, weight, bias, prefix="adamss_", few=few, of_numbers=True)


ROWS = {"adamss": row(few=True), "adamss-dynamic": row(use_dynamic_rank=True, r=100)}
