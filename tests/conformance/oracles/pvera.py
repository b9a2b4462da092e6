"""PVeRA, outside training."""

from __future__ import annotations

from torch import Tensor

from peft import PveraConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix


@on_matrix
def weight(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    shared = next(p.shared for p in layer.adapters.values() if "pvera_A" in p.shared)
    A, B = (next(iter(shared[k]._buffers.values())).double() for k in ("pvera_A", "pvera_B"))
    b, d = t["pvera_lambda_b"], t["pvera_lambda_d"][..., :4]
    return W + b[..., None] * (B[: W.shape[-2]] @ (d[..., None] * A[:4, : W.shape[-1]]))


ROWS = {"pvera": Row(PveraConfig, {"r": 4}, weight, prefix="pvera_")}
