"""C3A: blocks that are circulant matrices.

    W' = W + D,   D[u b + s, v b + t] = K[u, v, (t - s) mod b] / in,   b = block_size

K is (out / b, in / b, b). A circulant block is a correlation, which the forward computes by Fourier transforms, without
D. The default start is random, so that a new adapter changes the model; `init_weights=True` starts at zero. Numbers are
in float32 at least. Source: Chen et al. 2024, arXiv 2407.19342. Different from the peer: two active adapters add up, as
they do when merged; there the second is fed with the first one's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Delta, Site
from ..core.stack import Adapter, Stack
from ..kernels import circulant
from ..kernels.modes import lifted, single
from ..target_config import choice, divisor
from .additive import AdditiveConfig, AdditiveModel


@dataclass
class C3AConfig(AdditiveConfig):
    """The configuration of C3A."""

    kind = "C3A"
    added = frozenset({"exclude_modules"})
    ranks = ("block_size",)
    below = frozenset({"block_size_pattern"})
    block_size: int = field(default=256, metadata=describe("Size of a circulant block; it divides in and out."))
    block_size_pattern: dict | None = field(
        default_factory=dict,
        metadata=describe("Sizes that differ from block_size: {regular expression of names: size}."),
    )
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = field(
        default="xavier_uniform", metadata=describe("How the kernels are drawn; True: zero.")
    )

    def check(self) -> None:
        """Choices."""
        choice("init_weights", self.init_weights, (True, False, None, "gaussian", "kaiming_uniform", "xavier_uniform"))


class C3A(Delta):
    """W' = W + D with circulant blocks."""

    linear: ClassVar[dict[str, float]] = {"c3a_kernel": 0.0}
    sums_from = 1.0

    def build(self, site: Site) -> dict[str, Any]:
        b = site.settings.block_size
        *lead, out, inp = site.view.shape(site.module)
        divisor("block_size", b, (inp, out), site.path, ", for this layer alone with block_size_pattern")
        dtype = torch.promote_types(site.dtype, torch.float32)
        return {
            "c3a_kernel": nn.Parameter(torch.empty(*lead, out // b, inp // b, b, dtype=dtype, device=site.device)),
            "block_size": b,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        K, kind = p.c3a_kernel, p.settings.init_weights
        *_, out, inp = inner.view.shape(inner.base)
        if kind is True:
            K.zero_()
        elif kind == "gaussian":
            K.normal_()
        else:
            bound = 1 / math.sqrt(inp) if kind == "kaiming_uniform" else math.sqrt(6 / (inp + out))
            K.uniform_(-bound, bound)

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        K, b = p.held("c3a_kernel"), p.block_size
        start, stop, _ = rows.indices(K.shape[-3] * b)
        first = start // b
        K = K[..., first : -(-stop // b), :, :] / (K.shape[-2] * b)
        step = torch.arange(b, device=K.device)
        if lifted():  # vmap has no rule for windows
            turned = K[..., (step - step[:, None]) % b].transpose(-3, -2)
        else:  # of K and K again the window b - s is K turned by s
            turned = torch.cat((K, K), -1).unfold(-1, b, 1).transpose(-3, -2).index_select(-3, b - step)
        D = turned.flatten(-2).flatten(-3, -2)  # of (..., u, s, v, t)
        return D[..., start - first * b : stop - first * b, :]

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if not inner.view.dense or not x.numel():  # of nothing there is no transform
            return super().onto(p, inner, y, x)
        K = p.held("c3a_kernel")
        K = single(K)  # a model cast after all has kernels in half precision
        return (y + circulant.product(x, K, 1 / x.shape[-1])).to(y.dtype)


class C3ALayer(BaseTunerLayer):
    """A target under C3A adapters."""

    family = "c3a"
    adapter_layer_names = ("c3a_kernel",)
    other_param_names = ("block_size",)
    _parameter_homes = frozenset({"c3a_kernel"})


class C3AModel(AdditiveModel):
    """C3A adapters on a model."""

    prefix = "c3a_"
    layer_classes = name_layers(C3ALayer, globals(), "C3A")
    method: ClassVar[C3A] = C3A()
