"""Poly: for each task the mixture of all skills, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import PolyConfig
from peft.core.layer import BaseTunerLayer

from ..layouts import Layout
from .row import Row, on_matrix

R, SKILLS = 3, 2


def of_task(task: int) -> Any:
    """The formula of one task's weight."""

    @on_matrix
    def poly(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
        w = torch.sigmoid(t["poly_router.module_logits"][task].view(-1, SKILLS))
        w = w / w.sum(-1, keepdim=True)

        def update(A: Tensor, B: Tensor) -> Tensor:
            mixed = [[sum(w[q, s] * M[q, s] for s in range(SKILLS)) for q in range(len(A))] for M in (A, B)]
            down, up = torch.cat(mixed[0], 0), torch.cat(mixed[1], 1)  # type: ignore[arg-type]
            return (down @ up).mT / R

        A, B = t["poly_lora_A"], t["poly_lora_B"]
        return W + (update(A, B) if W.dim() == 2 else torch.stack([update(*one) for one in zip(A, B, strict=True)]))

    return poly


def odd(layout: Layout) -> str | None:
    return r"must divide the in-features \(5\)" if "separate" in layout.name else None


def row(splits: int, few: bool = True) -> Row:
    fields = {"r": R, "n_tasks": 3, "n_skills": SKILLS, "n_splits": splits}
    return Row(
        PolyConfig, fields, of_task(0), forbidden=odd if splits > 1 else Row.forbidden, prefix="poly_", few=few,
        merges=False, noise=0.5, tasks=(0, 2, 1, 2), of_task=of_task,
    )  # fmt: skip


ROWS = {"poly": row(1), "poly-splits": row(2, few=False)}
