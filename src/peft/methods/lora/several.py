"""Several plain LoRA adapters of one linear layer at work together: two products for each, where the base's lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...core.direct import matrix
from ...kernels import onto, slim
from ...kernels.modes import PLAIN, eager

if TYPE_CHECKING:
    from ...core.stack import Adapter, Stack


def several(p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
    """W x + b + the sum of s B A x over p and the adapters below it; None where any of them does more, or may do.

    Arguments:
        p: an adapter of LoRA itself, which has noted its modules.
        inner: the layer under the others.
        x: (..., d), of the dtype of all weights.
    """
    if inner.extra is not None or x.dim() < 2 or type(x) not in PLAIN or x.is_nested or not eager():
        return None
    base, factors = p.hot[0], []
    held = base._parameters
    W = held["weight"]
    for one in (*inner.adapters, p):
        if type(one.method) is not type(p.method) or one.hot is None or not one.method.is_plain(one):
            return None
        a, b = one.hot[1]._parameters["weight"], one.hot[2]._parameters["weight"]
        if not (type(W) is type(a) is type(b) is nn.Parameter and W.dtype is a.dtype is b.dtype is x.dtype):
            return None
        factors.append((a, b, one.scaling))
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return onto.thin(x, matrix(base, W), held["bias"], *((slim.down(flat, a), b.mT, s) for a, b, s in factors))
