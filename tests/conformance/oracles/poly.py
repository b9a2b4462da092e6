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
        A, B = t["poly_lora_A"], t["poly_lora_B"]
        splits = range(len(A))
        w = torch.sigmoid(t["poly_router.module_logits"][task].view(-1, SKILLS))
        w = w / w.sum(-1, keepdim=True)
        down = torch.cat([sum(w[q, s] * A[q, s] for s in range(SKILLS)) for q in splits], 0)  # type: ignore[arg-type]
        up = torch.cat([sum(w[q, s] * B[q, s] for s in range(SKILLS)) for q in splits], 1)  # type: ignore[arg-type]
        return W + (down @ up).mT / R

    return poly


def one_weight(layout: Layout) -> str | None:
    return "weight of its own" if layout.kind in ("attention", "parameter") else None


def row(splits: int, few: bool = True) -> Row:
    fields = {"r": R, "n_tasks": 3, "n_skills": SKILLS, "n_splits": splits}
    return Row(
        PolyConfig, fields, of_task(0), forbidden=one_weight, prefix="poly_", few=few, merges=False,
        noise=0.5, tasks=(0, 2, 1, 2), of_task=of_task,
    )  # fmt: skip


ROWS = {"poly": row(1), "poly-splits": row(2, few=False)}
