"""PSOFT: exact, as a series with a limit, with half of the singular values on each side, and with any matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import PsoftConfig
from peft.core.layer import BaseTunerLayer

from .oft import neumann, skew
from .row import Row, eye, on_matrix

R = 3


def exact(Q: Tensor) -> Tensor:
    return (eye(R, Q) + Q) @ torch.linalg.inv(eye(R, Q) - Q)


def within(Q: Tensor) -> Tensor:
    """Five terms of a Q whose norm is at most 0.4."""
    size = Q.norm()
    return neumann(Q * (0.4 / size) if size > 0.4 else Q)


def weight(make: Any, power: float) -> Any:
    def of(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
        stored = layer.view.sample(layer.get_base_layer()).dtype
        precise = torch.float64 if stored is torch.float64 else torch.float32

        def middle(t: dict[str, Tensor], at: Any) -> Tensor:
            rotation = make(t["psoft_R.weight"][at])
            b, a = (t.get(f"psoft_R.vector_{side}") for side in "ba")
            rotation = rotation if b is None else b[at].diag() @ rotation
            return rotation if a is None else rotation @ a[at].diag()

        @on_matrix
        def changed(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
            U, S, Vh = (f.double() for f in torch.linalg.svd(base.to(precise), full_matrices=False))
            U, S, Vh = U[..., :R], S[..., :R], Vh[..., :R, :]
            B, A = U * (S**power)[..., None, :], (S ** (1 - power))[..., None] * Vh
            lead = M.shape[:-2]
            rotation = torch.stack([middle(t, e) for e in range(lead[0])]) if lead else middle(t, ...)
            return M + B @ (rotation - eye(R, M)) @ A

        @on_matrix
        def matrix(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
            nonlocal base
            base = M.detach()
            return M

        base = original
        matrix(layer, name, original, original)
        return changed(layer, name, W, original)

    return of


def row(make: Any, power: float = 1.0, **more: Any) -> Row:
    few = more.pop("few", False)
    return Row(PsoftConfig, {"r": R, **more}, weight(make, power), prefix="psoft_", few=few)


ROWS = {
    "psoft": row(lambda v: exact(skew(v, R)), few=True),
    "psoft-series": row(
        lambda v: within(skew(v, R)), use_cayley_neumann=True, cayley_neumann_eps=0.4, psoft_mag_b=False
    ),
    "psoft-half": row(lambda v: exact(skew(v, R)), 0.5, ab_svd_init="pissa_init", psoft_mag_a=False),
    "psoft-any": row(lambda M: M, psoft_orth=False),
}
