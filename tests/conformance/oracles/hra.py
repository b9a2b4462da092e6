"""HRA: mirrors one after the other, and orthogonal ones."""

from __future__ import annotations

import torch
from torch import Tensor

from peft import HRAConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, eye, on_matrix


def product(u: Tensor) -> Tensor:
    """The mirrors from left to right."""
    H = eye(len(u), u)
    for k in range(u.shape[1]):
        v = u[:, k : k + 1]
        H = H @ (eye(len(u), u) - 2 * v @ v.T / (v * v).sum())
    return H


def orthogonal(u: Tensor) -> Tensor:
    """The same of the mirrors made orthogonal one by one."""
    found: list[Tensor] = []
    for k in range(u.shape[1]):
        v = u[:, k]
        for q in found:
            v = v - (q @ v) * q
        found.append(v / v.norm())
    return product(torch.stack(found, 1))


def reflected(H: object) -> object:
    @on_matrix
    def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
        u = t["hra_u"]
        if u.dim() == 3:
            return torch.stack([w @ H(v) for w, v in zip(W, u, strict=True)])
        # of an embedding the vectors are mirrored: y H'
        return H(u) @ W if "embedding" in type(layer.get_base_layer()).__name__.lower() else W @ H(u)

    return weight


ROWS = {
    "hra": Row(HRAConfig, {"r": 4}, reflected(product), prefix="hra_", noise=1.0),
    "hra-orthogonal": Row(
        HRAConfig,
        {"r": 2, "apply_GS": True, "init_weights": False},
        reflected(orthogonal),
        prefix="hra_",
        few=False,
        identity=False,
        noise=1.0,
    ),
}
