"""OFT: the in-features of a weight turned, block by block, by learnt rotations.

    W' = W R',   R = diag(R_1 .. R_r),   R_c = (I - Q_c) (I + Q_c)^-1,   Q_c skew

Q_c holds b (b - 1) / 2 numbers, which start at zero, so training starts at the base model. With `use_cayley_neumann`
R is a series instead, `kernels.rotations.series`: it turns the other way and is orthogonal only nearly. Constrained
(`coft`), each Q_c stays within a ball. Sources: Qiu et al., arXiv 2306.07280, eq. 5 and section 4; arXiv 2506.19847.

Different from the peer: `module_dropout` works (in training each block is the identity with this probability); a
convolution computes what its merged weight does; two adapters act in the order in which they are merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.kept import kept
from ..core.layer import name_layers
from ..core.method import Site
from ..core.rotation import Rotation, blockwise, within, without
from ..core.scale import UnscaledLayer
from ..core.stack import Adapter, Stack
from ..core.tuner import BaseTuner
from ..errors import PeftWarning, report
from ..kernels.rotations import cayley, series, skew, turned
from ..target_config import TargetConfig, check_series, choice, number, probability, rank


@dataclass
class OFTConfig(TargetConfig):
    """The configuration of OFT: blocks by their number `r` or by their size `oft_block_size`."""

    kind = "OFT"
    ranks = ("num_cayley_neumann_terms",)
    r: int = field(default=0, metadata=describe("Number of blocks; 0 where their size is given."))
    oft_block_size: int = field(default=32, metadata=describe("Size of a block; 0 where their number is given."))
    module_dropout: float = field(default=0.0, metadata=describe("Share of blocks left out in training."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))
    coft: bool = field(default=False, metadata=describe("Keep the rotations small."))
    eps: float = field(default=6e-5, metadata=describe("How small: the norm of all blocks' Q."))
    block_share: bool = field(default=False, metadata=describe("One block for all."))
    use_cayley_neumann: bool = field(default=True, metadata=describe("A series instead of the inverse: faster."))
    num_cayley_neumann_terms: int = field(default=5, metadata=describe("Terms of the series."))

    def check(self) -> None:
        """Either the number or the size of blocks is given."""
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"Exactly one of r={self.r} and oft_block_size={self.oft_block_size} must be non-zero. Set r=0 to give "
                "the size of a block, or oft_block_size=0 to give their number."
            )
        rank("r" if self.r else "oft_block_size", self.r or self.oft_block_size)
        probability("module_dropout", self.module_dropout)
        number("eps", self.eps)
        choice("init_weights", self.init_weights, (True, False))
        check_series(self)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Files of an older parametrisation are refused."""
        if "oft_block_size" not in kwargs:
            raise ValueError("This OFT adapter has no oft_block_size: its parametrisation is older. Train it again.")
        version = [int(v) for v in str(kwargs.get("peft_version") or "0").split(".")[:2] if v.isdigit()]
        if kwargs.get("use_cayley_neumann", True) and version < [0, 18]:
            text = "This OFT adapter is older than release 0.18, which changed the series: answers may differ a bit."
            report(PeftWarning, text, strict=False, stacklevel=5)
        return super().check_kwargs(**kwargs)


class OFTRotationModule(nn.Module):
    """Holds the numbers of the skew blocks under the name that checkpoints have."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight


class OFT(Rotation):
    """W' = W R'."""

    def build(self, site: Site) -> dict[str, Any]:
        c, view = site.settings, site.view
        *lead, out, inp = view.shape(site.module)
        whole = out if view.infix else inp * view.groups(site.module)
        size = nearest_divisor(site.path, whole, c.r, c.oft_block_size)
        if not view.infix and inp % size:  # a block within one group of channels
            size = nearest_divisor(site.path, inp, 0, c.oft_block_size or size)
        held = torch.zeros(*lead, 1 if c.block_share else whole // size, size * (size - 1) // 2, **site.kwargs)
        return {
            f"oft_{view.infix}R": OFTRotationModule(nn.Parameter(held)),
            "r": whole // size,
            "oft_block_size": size,
            "oft_dropout": c.module_dropout,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        if not p.settings.init_weights:
            p.held(f"oft_{inner.view.infix}R").weight.normal_(std=0.1)

    def rotate(self, p: Adapter, t: Tensor, back: bool = False, drop: bool = False) -> Tensor:
        R = kept(p, lambda: self.blocks(p))
        if R.shape[-3] != p.r:
            R = R.expand(*R.shape[:-3], p.r, -1, -1)
        if drop and p.oft_dropout:
            R = without(R, torch.rand(R.shape[:-2], dtype=torch.float32, device=R.device) < p.oft_dropout)
        groups = p.layer.view.groups(p.layer.get_base_layer())
        R = R if groups == 1 else R.unflatten(-3, (groups, -1))
        return blockwise(t, R.mT if back else R)

    def at_once(self, p: Adapter, x: Tensor) -> Tensor | None:
        c = p.settings
        if c.coft or (p.oft_dropout and p.layer.training) or c.block_share:
            return None
        held = p.held("oft_R").weight
        return turned(x, held, p.oft_block_size, c.num_cayley_neumann_terms if c.use_cayley_neumann else 0)

    def blocks(self, p: Adapter) -> Tensor:
        """The stored rotations, (..., n, b, b)."""
        c, b = p.settings, p.oft_block_size
        held = p.held(f"oft_{p.layer.view.infix}R").weight
        if c.coft:
            held = within(held, c.eps / math.sqrt(held.shape[-2]), p.layer.training)
        Q = skew(held, b)
        return series(Q, c.num_cayley_neumann_terms) if c.use_cayley_neumann else cayley(Q)


def nearest_divisor(path: str, n: int, count: int, size: int) -> int:
    """The size of a block, of n features in all; the nearest that fits, with a warning, where the wish does not."""
    wish, name = count or size, "r" if count else "oft_block_size"
    found = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wish), d))
    if found != wish:
        text = f"{name}={wish} does not divide the {n} features of {path!r}. Using {found}, the nearest that does."
        report(PeftWarning, text, strict=False, stacklevel=9)
    if (size := n // found if count else found) == 1:
        report(PeftWarning, f"Blocks of one feature turn nothing: {path!r} trains nothing. Use larger ones.", None, 9)
    return size


class OFTLayer(UnscaledLayer):
    """A target under OFT adapters."""

    family = "oft"
    adapter_layer_names = ("oft_R", "oft_embedding_R")
    other_param_names = ("r", "oft_block_size", "oft_dropout")


class OFTModel(BaseTuner):
    """OFT adapters on a model."""

    prefix = "oft_"
    layer_classes = name_layers(OFTLayer, globals())
    method: ClassVar[OFT] = OFT()
