"""OSF: with gradients projected, of a number of directions and of half of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import OSFConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix


def outside(x: Tensor, basis: Tensor) -> Tensor:
    """x, whose gradient is projected on the complement of an orthonormal basis (n, k)."""
    inside = basis @ (basis.mT @ x)
    return x - inside + inside.detach()


def weight(k: int | None) -> Any:
    def of(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
        base: Any = layer.get_base_layer()
        kind = layer.packed
        stored = layer.view.sample(base).dtype if kind is None else kind.dtype(base, "weight")
        precise = torch.float64 if stored is torch.float64 else torch.float32
        bases: list[Tensor] = []

        @on_matrix
        def noted(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
            bases.append(M.detach())
            return M

        @on_matrix
        def changed(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
            parts = torch.linalg.svd(bases[0].to(precise), full_matrices=False)
            U0, S0, V0 = (f.to(stored).double() for f in parts)
            n = S0.shape[-1] // 2 if k is None else k
            U, S, V = (t[f"osf_svd_params.{part}_low"] for part in "USV")
            U, V = outside(U, U0[..., :n]), outside(V.mT, V0[..., :n, :].mT).mT
            first = U0[..., n:] @ torch.diag_embed(S0[..., n:]) @ V0[..., n:, :]
            return M + U @ torch.diag_embed(S) @ V - first

        noted(layer, name, original, original)
        return changed(layer, name, W, original)

    return of


ROWS = {
    "osf": Row(OSFConfig, {"effective_rank": 3}, weight(3), prefix="osf_"),
    "osf-half": Row(OSFConfig, {}, weight(None), prefix="osf_", few=False),
}
