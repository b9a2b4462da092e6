"""Updates that are added where the base's product lies: one pass over the output in place of two.

Letters: N rows, d in-features, k out-features, r features in between; x is (..., d), W is (k, d). An output made here
belongs to nobody else, so that it may be changed. What each function computes is its first line; other dtypes are added
by ordinary sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import slim
from .modes import changed, reused, transformed


def thin(x: Tensor, W: Tensor, b: Tensor | None, *terms: tuple[Tensor, Tensor, Any]) -> Tensor:
    """W x + b + the sum of s h B over the terms (h, B, s), with h (N, r) and B (r, k), in the dtype of W x.

    It is for where `core.direct.open_linear` gives W and b, so that neither autocast nor a transform is in force.
    """
    y = F.linear(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), W, b)
    rest: Tensor | None = None  # in a wider dtype, rounded once: terms may nearly cancel
    for h, B, s in terms:
        if type(s) is float and y.dtype is h.dtype and y.dtype is B.dtype:
            large = torch.is_grad_enabled() and not transformed() and y.numel() >= slim.LARGE
            y = slim.onto(y, h, B.mT, s) if large else (y.addmm if reused() else y.addmm_)(h, B, alpha=s)
        elif type(s) is float and h.dtype is B.dtype:
            rest = changed(y.to(h.dtype) if rest is None else rest, "addmm", h, B, alpha=s)
        else:
            rest = h @ B * s + (y if rest is None else rest)
    if rest is not None:
        y = rest.to(y.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def features(y: Tensor, u: Tensor, gain: Tensor) -> Tensor:
    """y + u diag(gain), (..., k), in the dtype of y; where `thin` may be used."""
    if u.dtype is not y.dtype:
        return (y + u * gain).to(y.dtype)
    return changed(y, "add", u * gain) if torch.is_grad_enabled() else y.addcmul_(u, gain)  # whose derivative copies u


def repeated(x: Tensor, W: Tensor, b: Tensor | None, h: Tensor, B: Tensor, s: Any) -> Tensor:
    """W x + b + s h B repeated along its features, for B (r, a part of k), in the dtype of W x; as `thin`."""
    y, u = F.linear(x, W, b), h @ B * s
    parts, u = y.view(u.shape[0], W.shape[0] // u.shape[1], u.shape[1]), u[:, None]
    return (changed(parts, "add", u) if u.dtype is y.dtype else (parts + u).to(y.dtype)).view(y.shape)


def shards(x: Tensor, r: int) -> Tensor:
    """The sum of an input's parts of r features, (N, r); the last part is filled with zeros."""
    missing = -x.shape[-1] % r
    return (F.pad(x, (0, missing)) if missing else x).reshape(-1, (x.shape[-1] + missing) // r, r).sum(1)
