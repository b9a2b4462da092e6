"""Layers in traces of torch.jit, which serve training and evaluation, and any number of rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn


class Recorded(nn.Module):
    """The part of a tuner layer that torch calls in place of `forward` while a trace is made."""

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, by the operations of training: torch compares a trace with gradients to one without."""
        if torch.onnx.is_in_onnx_export():
            _known()
        with torch.enable_grad():
            return super()._slow_forward(*args, **kwargs)


@cache
def _known() -> None:
    """Tell torch's exporter of traces to ONNX of operations that it has no words for."""
    for name, symbol, opset in (("mT", _mT, 9), ("diag_embed", _diag_embed, 15), ("block_diag", _block_diag, 11)):
        torch.onnx.register_custom_op_symbolic(f"aten::{name}", symbol, opset)


def _mT(g: Any, x: Any) -> Any:
    *lead, rows, columns = range(x.type().dim())
    return g.op("Transpose", x, perm_i=[*lead, columns, rows])


def _diag_embed(g: Any, x: Any, *_: Any) -> Any:
    """Of the last dimension, on the diagonal itself, as adapters have it."""
    one = torch.eye(x.type().sizes()[-1], dtype=torch.float32, device="cpu")
    column = g.op("Unsqueeze", x, g.op("Constant", value_t=_numbers(-1)))
    return g.op("Mul", column, g.op("CastLike", g.op("Constant", value_t=one), x))


def _block_diag(g: Any, tensors: Any) -> Any:
    """Of matrices."""
    blocks = list(tensors.node().inputs())
    widths = [t.type().sizes()[1] for t in blocks]
    rows = []
    for i, t in enumerate(blocks):
        around = _numbers(0, sum(widths[:i]), 0, sum(widths[i + 1 :]))
        rows.append(g.op("Pad", t, g.op("Constant", value_t=around)))
    return g.op("Concat", *rows, axis_i=0)


def _numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
