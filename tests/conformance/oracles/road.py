"""RoAd in its three variants."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from peft import RoadConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, held, on_matrix

G = 2


def matrix(theta: Tensor, alpha: Tensor, variant: int, out: int) -> Tensor:
    """R, (out, out), element by element."""
    zero = theta.new_zeros(())
    R = [[zero] * out for _ in range(out)]
    for g in range(out // G):
        for j in range(G // 2):
            one, two = g * G + j, g * G + G // 2 + j
            if variant == 1:
                c1 = c2 = d1 = d2 = g * G // 2 + j
            elif variant == 2:
                c1, d1, c2, d2 = one, one, two, two
            else:
                c1, c2 = 2 * g * G + j, 2 * g * G + G // 2 + j
                d1, d2 = c1 + G, c2 + G
            R[one][one], R[one][two] = alpha[c1] * theta[c1].cos(), -alpha[d1] * theta[d1].sin()
            R[two][one], R[two][two] = alpha[d2] * theta[d2].sin(), alpha[c2] * theta[c2].cos()
    return torch.stack([torch.stack(r) for r in R])


def weight(variant: int) -> object:
    @on_matrix
    def turned(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
        theta, alpha = t["road_theta"], t["road_alpha"]
        if theta.dim() == 1:
            return matrix(theta, alpha, variant, len(W)) @ W
        return torch.stack([matrix(*ab, variant, len(w)) @ w for *ab, w in zip(theta, alpha, W, strict=True)])

    return turned


def bias(variant: int, layer: BaseTunerLayer, name: str, b: Tensor | None) -> Tensor | None:
    t = held(layer, name)
    return None if b is None else matrix(t["road_theta"], t["road_alpha"], variant, len(b)) @ b


ROWS = {
    f"road-{k}": Row(
        RoadConfig,
        {"variant": f"road_{k}", "group_size": G},
        weight(k),
        partial(bias, k),
        prefix="road_",
        few=k == 4,
    )
    for k in (1, 2, 4)
}
