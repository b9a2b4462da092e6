"""Super-Tuning: the largest and the smallest weights, with and without a LoRA beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import SupertuningConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix

R, SPARSITY, ALPHA = 2, 0.6, 3.0


def weight(largest: bool) -> Any:
    def of(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
        at = layer.supertuning_indices[name].long()

        @on_matrix
        def check(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
            """The places are those of the n largest weights, in descending order."""
            size = M.detach().abs().flatten(-2)
            n = int(size.shape[-1] * (1 - SPARSITY))
            assert at.shape[-1] == n
            assert torch.equal(size.gather(-1, at), size.sort(-1, descending=largest).values[..., :n])
            return M

        @on_matrix
        def changed(t: dict[str, Tensor], M: Tensor, layer: BaseTunerLayer) -> Tensor:
            values = t["supertuning_values"]
            V = torch.zeros_like(M, dtype=values.dtype).flatten(-2).scatter(-1, at, values).unflatten(-1, M.shape[-2:])
            if "supertuning_lora_A.weight" in t:
                V = V + (ALPHA / R) * t["supertuning_lora_B.weight"] @ t["supertuning_lora_A.weight"]
            return M + V

        check(layer, name, original, original)
        return changed(layer, name, W, original)

    return of


def row(largest: bool = True, few: bool = False, **more: Any) -> Row:
    return Row(SupertuningConfig, {"sparsity": SPARSITY, **more}, weight(largest), prefix="supertuning_", few=few)


ROWS = {
    "supertuning": row(few=True),
    "supertuning-smallest": row(largest=False, select_top=False, save_precomputed_indices=False),
    "supra": row(r=R, lora_alpha=ALPHA),
}
