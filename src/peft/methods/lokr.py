"""LoKr: a Kronecker product of two small matrices.

    W' = W + s W1 (x) W2,   block (a, b) of the product is W1[a, b] W2,   s = alpha / r

W1 is (o1, i1) and W2 is (o2, i2), out = o1 o2 and in = i1 i2 split near their roots, or by `decompose_factor`. W2, and
W1 with `decompose_both`, is a product of two factors of rank r where that is smaller. On a convolution the product is
of channels, and W2 holds the kernel: (o2, i2, kernel), or factors, or with `use_effective_conv2d` a Tucker product. W1
starts at zero, so training starts at the base model. Sources: LyCORIS, Yeh et al. 2023, arXiv 2309.14859. A Conv1d with
a whole W2 multiplies W2 (x) W1, as adapters of the peer are trained; a Tucker product on it works, and fails there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import describe
from ..core import draw
from ..core.direct import open_linear
from ..core.layer import name_layers
from ..core.method import Site
from ..core.stack import Adapter, Stack
from ..core.thinned import Thinned
from ..kernels import kron, product
from ..kernels.kron import factorization
from ..kernels.modes import WIDE
from ..kernels.whole import touched
from ..target_config import choice, rank
from .loha import LycorisConfig, LycorisLayer, LycorisModel, core_shape

NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
SMALL = 20_000  # numbers in W, up to which its gradient costs less than what it saves
BROAD = 2**10  # in-features of a convolution's W, from which on the parts of a product are convolved with


@dataclass
class LoKrConfig(LycorisConfig):
    """The configuration of LoKr."""

    kind = "LOKR"
    decompose_both: bool = field(default=False, metadata=describe("W1 may be a product of two factors, too."))
    decompose_factor: int = field(default=-1, metadata=describe("Size of W1, or what it may not exceed; -1: a root."))
    rank_dropout_scale: bool = field(
        default=False, metadata=describe("Under rank_dropout, what is left makes up for what is dropped.")
    )
    init_weights: bool | Literal["lycoris"] = field(
        default=True, metadata=describe("Zero in W1; 'lycoris': zero in W2; False: all at random.")
    )

    def check(self) -> None:
        """Numbers and choices."""
        super().check()
        choice("init_weights", self.init_weights, (True, False, "lycoris"))
        if self.decompose_factor != -1:
            rank("decompose_factor", self.decompose_factor)


class LoKr(Thinned):
    """W' = W + s W1 (x) W2."""

    def build(self, site: Site) -> dict[str, Any]:
        c, kernel = site.settings, site.view.kernel(site.module)
        *lead, out, inp = site.view.shape(site.module)
        size = math.prod(kernel)
        o1, o2 = factorization(out, c.decompose_factor)
        i1, i2 = factorization(inp // size, c.decompose_factor)
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (o1, i1)}
        if c.decompose_both and c.r < max(o1, i1) / 2:
            shapes = {"lokr_w1_a": (o1, c.r), "lokr_w1_b": (c.r, i1)}
        if c.r >= max(o2, i2) / 2:
            shapes["lokr_w2"] = (o2, i2, *kernel)
        elif c.use_effective_conv2d and size > 1:
            shapes.update(lokr_t2=core_shape(c.r, kernel), lokr_w2_a=(c.r, o2), lokr_w2_b=(c.r, i2))
        else:
            shapes.update(lokr_w2_a=(o2, c.r), lokr_w2_b=(c.r, i2 * size))
        tensors = {name: nn.Parameter(torch.empty(*lead, *shape, **site.kwargs)) for name, shape in shapes.items()}
        return {**tensors, **c.values(), "sizes": (o1, o2, i1, i2), "lead": len(lead), "forms": tuple(shapes)}

    def init(self, p: Adapter, inner: Stack) -> None:
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}
        for name in NAMES:
            if name in p.forms:
                t = p.held(name)
                draw.kaiming(t, t.dim() - p.lead)
                if name in zero[p.settings.init_weights]:
                    t.zero_()

    def pair(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """W1 (..., o1, i1) and W2 (..., o2, i2, kernel)."""
        W1 = p.held("lokr_w1") if "lokr_w1" in p.forms else p.held("lokr_w1_a") @ p.held("lokr_w1_b")
        if "lokr_w2" in p.forms:
            W2 = p.held("lokr_w2")
            return W1, W2.flatten(2) if W2.dim() > 2 + p.lead else W2.unsqueeze(-1)
        a, b = p.held("lokr_w2_a"), p.held("lokr_w2_b")
        if "lokr_t2" in p.forms:
            return W1, product.tucker(p.held("lokr_t2"), a, b)
        return W1, (a @ b).unflatten(-1, (p.sizes[3], -1))

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        W1, W2 = self.pair(p)
        o1, o2, _, _ = p.sizes
        W1 = W1 * p.scaling
        start, stop, _ = rows.indices(o1 * o2)
        if "lokr_w2" in p.forms and p.held("lokr_w2").dim() == 3 and not p.lead:
            W2 = W2[start // o1 : -(-stop // o1)]
            D, skipped = (W1[:, None, :, None] * W2[:, None, :, None]).flatten(0, 1), start // o1 * o1
            return D.flatten(1)[start - skipped : stop - skipped]
        W1 = W1[..., start // o2 : -(-stop // o2), :]
        D, skipped = W1[..., None, :, None, None] * W2[..., None, :, None, :, :], start // o2 * o2
        return D.flatten(-3).flatten(-3, -2)[..., start - skipped : stop - skipped, :]

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        """Where rows are many beside W, and on a CPU, one product with W' costs less than small ones for each row."""
        held = open_linear(inner, x) if x.is_cpu and x.dtype in WIDE and not self.thins(p) else None
        if held is None or p.held(p.forms[0]).dtype is not x.dtype or torch.compiler.is_compiling():
            return None
        W, b = held
        if touched(x, W) < W.numel() or (W.numel() > SMALL and torch.is_grad_enabled()):
            return None
        return F.linear(x, W + self.delta(p, W), b)

    def makes_delta(self, p: Adapter) -> bool:
        """On a convolution two smaller ones take longer than one with the product, where that is narrow."""
        view, base = p.layer.view, p.layer.get_base_layer()
        kernel, turned = view.kernel(base), p.has("lokr_w2") and p.held("lokr_w2").dim() == 3
        wide = bool(kernel) and view.groups(base) == 1 and view.shape(base)[-1] >= BROAD and not turned
        return self.thins(p) or not (view.dense or wide)

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if self.makes_delta(p):
            return super().onto(p, inner, y, x)
        W1, W2 = self.pair(p)
        if inner.view.dense:
            return kron.add(y, x, W1, W2.squeeze(-1), p.scaling)
        h = inner.linear(x, W2.flatten(1).repeat(W1.shape[1], 1))  # each of i1 groups of channels by itself
        return (y + kron.across(h, W1 * p.scaling, len(inner.view.kernel(inner.base)))).to(y.dtype)


class LoKrLayer(LycorisLayer):
    """A target under LoKr adapters."""

    family = "lokr"
    adapter_layer_names = NAMES
    _parameter_homes = frozenset(NAMES)


class LoKrModel(LycorisModel):
    """LoKr adapters on a model."""

    prefix = "lokr_"
    layer_classes = name_layers(LoKrLayer, globals())
    method: ClassVar[LoKr] = LoKr()
