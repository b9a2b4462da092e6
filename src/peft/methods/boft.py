"""BOFT: the in-features turned by several layers of small rotations, joined as in a fast Fourier transform.

    W' = diag(s) W R',   R = F_(m-1) .. F_0,   F_k = P_k diag(C_1 .. C_D) P_k'
    C = (I - Q) (I + Q)^-1,   Q = (M - M') / 2

P_k puts features that are far apart into one block, so that m factors of small blocks mix them all. M starts at zero
and s at one, so training starts at the base model. Source: Liu et al. 2023, arXiv 2311.06243, section 4.

Different from the peer: several factors work without a compiled extension; there m is taken as 1 where that is missing.
A file that was made so is loaded with the one factor that it holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.kept import kept
from ..core.layer import name_layers
from ..core.method import Site
from ..core.rotation import Rotation, blockwise, without
from ..core.scale import UnscaledLayer
from ..core.stack import Adapter, Stack
from ..core.tuner import BaseTuner
from ..kernels.rotations import cayley
from ..target_config import TargetConfig, choice, probability, rank


@dataclass
class BOFTConfig(TargetConfig):
    """The configuration of BOFT: blocks by their size `boft_block_size` or by their number `boft_block_num`."""

    kind = "BOFT"
    ranks = ("boft_n_butterfly_factor",)
    boft_block_size: int = field(default=4, metadata=describe("Size of a block; 0 where their number is given."))
    boft_block_num: int = field(default=0, metadata=describe("Number of blocks; 0 where their size is given."))
    boft_n_butterfly_factor: int = field(default=1, metadata=describe("Number of factors."))
    boft_dropout: float = field(default=0.0, metadata=describe("Share of a factor's blocks left out in training."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))

    def check(self) -> None:
        """Either the number or the size of blocks is given."""
        size, count = self.boft_block_size, self.boft_block_num
        if (size == 0) == (count == 0):
            raise ValueError(
                f"Exactly one of boft_block_size={size} and boft_block_num={count} must be non-zero. Set one to 0."
            )
        rank("boft_block_num" if count else "boft_block_size", count or size)
        probability("boft_dropout", self.boft_dropout)
        choice("init_weights", self.init_weights, (True, False))


class BOFT(Rotation):
    """W' = diag(s) W R'."""

    def build(self, site: Site) -> dict[str, Any]:
        c, view = site.settings, site.view
        *lead, out, inp = view.shape(site.module)
        size, count = blocks(site.path, out if view.infix else inp, c)
        s = torch.ones(*lead, out, **site.kwargs)
        flat = lead or view.dense or view.infix or not view.activations
        R = torch.zeros(*lead, c.boft_n_butterfly_factor, count, size, size, **site.kwargs)
        return {
            "boft_R": nn.Parameter(R),
            "boft_s": nn.Parameter(s.unsqueeze(-1) if flat else s.unsqueeze(0)),
            "boft_block_size": size,
            "boft_block_num": count,
            "boft_dropout": c.boft_dropout,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        if not p.settings.init_weights:
            p.boft_R.normal_(std=0.1)
            p.boft_s.normal_(mean=1, std=0.1)

    def takes(self, p: Adapter, key: str, shape: tuple[int, ...]) -> bool:
        here = tuple(p.boft_R.shape)
        return key == "boft_R" and len(shape) == len(here) and shape[-4] == 1 and shape[-3:] == here[-3:]

    def scale(self, p: Adapter) -> Tensor:
        """s, (..., O)."""
        return p.held("boft_s").flatten(len(p.layer.view.shape(p.layer.get_base_layer())) - 2)

    def rotate(self, p: Adapter, t: Tensor, back: bool = False, drop: bool = False) -> Tensor:
        M, b = p.held("boft_R"), p.boft_block_size
        C = kept(p, lambda: cayley((M - M.mT) / 2))
        m = C.shape[-4]
        if drop and p.boft_dropout:
            lost = torch.zeros(m, C.shape[-3], dtype=torch.bool, device=C.device)
            chosen = torch.randperm(C.shape[-3], device=C.device)[: int(p.boft_dropout * C.shape[-3])]
            lost[torch.randint(m, (1,), device=C.device), chosen] = True
            C = without(C, lost)
        for k in range(m) if back else reversed(range(m)):
            F = C.select(-4, k)
            t = regroup(blockwise(regroup(t, k, b, True), F.mT if back else F), k, b, False)
        return t

    def weight(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        return (super().weight(p, W, rows) * self.scale(p)[..., rows, None]).to(W.dtype)

    def live_weight(self, p: Adapter, W: Tensor) -> Tensor:
        return (super().live_weight(p, W) * self.scale(p)[..., None]).to(W.dtype)

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        y = super().forward(p, inner, x)
        if not inner.view.dense and not self.on_output(p):
            return y  # it was made of the whole W'
        s, b = inner.spread(self.scale(p)), inner.bias()
        b = None if b is None else inner.spread(b)
        return (y * s if b is None else (y - b) * s + b).to(y.dtype)


def blocks(path: str, n: int, c: BOFTConfig) -> tuple[int, int]:
    """(size, number) of the blocks of n features; raises ValueError where they do not fit."""
    size, count = c.boft_block_size or n // c.boft_block_num, c.boft_block_num or n // c.boft_block_size
    m, fits = c.boft_n_butterfly_factor, [d for d in range(1, n + 1) if n % d == 0]
    if size * count != n:
        name = "boft_block_size" if c.boft_block_size else "boft_block_num"
        raise ValueError(f"{name}={getattr(c, name)} does not divide the {n} features of {path!r}. Use one of {fits}.")
    groups = max(2, 2 ** min(m - 1, n.bit_length()))  # more than n, whatever a file says of m
    even = [k for k in fits if k % 2 == 0 and n % (k * groups) == 0]
    if m > 1 and size not in even:
        way = f"Use boft_block_size of {even}" if even else "Use boft_n_butterfly_factor=1"
        raise ValueError(
            f"boft_n_butterfly_factor={m} needs blocks of even size and number, and features that are a multiple of "
            f"size * 2^{m - 1}. {path!r} has {n} features in {count} blocks of {size}. {way}, or exclude the layer "
            "(`exclude_modules`)."
        )
    return size, count


def regroup(t: Tensor, k: int, size: int, back: bool) -> Tensor:
    """t P_k' on the last axis, t P_k if `back`: in each group of 2^k blocks, even half blocks first, then the odd."""
    pairs = (2, 2**k) if back else (2**k, 2)
    return t.unflatten(-1, (-1, *pairs, size // 2)).transpose(-3, -2).flatten(-4) if k else t


class BOFTLayer(UnscaledLayer):
    """A target under BOFT adapters."""

    family = "boft"
    adapter_layer_names = ("boft_R", "boft_s")
    other_param_names = ("boft_block_size", "boft_block_num", "boft_dropout")
    _parameter_homes = frozenset({"boft_R", "boft_s"})


class BOFTModel(BaseTuner):
    """BOFT adapters on a model."""

    prefix = "boft_"
    layer_classes = name_layers(BOFTLayer, globals())
    method: ClassVar[BOFT] = BOFT()
