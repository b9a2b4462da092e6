"""VeRA."""

from __future__ import annotations

from torch import Tensor

from peft import VeraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix


@on_matrix
def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    shared = next(p.shared for p in layer.adapters.values() if "vera_A" in p.shared)
    A, B = (next(iter(shared[k]._buffers.values())).double() for k in ("vera_A", "vera_B"))
    b, d = t["vera_lambda_b"], t["vera_lambda_d"]
    return W + b[..., None] * (B[: W.shape[-2]] @ (d[..., None] * A[:, : W.shape[-1]]))


ROWS = {"vera": Row(VeraConfig, {"r": 4}, weight, prefix="vera_")}
