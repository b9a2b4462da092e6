"""Nested tensors, of which torch computes few things: a layer that maps rows runs on those of all parts as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_rows(run: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """What `run` makes of the last axis of x, nested as x is."""
    if x.layout is torch.jagged and x._ragged_idx == 1 and x.lengths() is None:
        return torch.nested.nested_tensor_from_jagged(run(x.values()), x.offsets())
    parts = x.unbind()
    y = run(torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]))
    made = y.split([part.shape[:-1].numel() for part in parts])
    return torch.nested.as_nested_tensor(
        [rows.unflatten(0, part.shape[:-1]) for rows, part in zip(made, parts, strict=True)], layout=x.layout
    )
