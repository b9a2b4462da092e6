"""PSOFT: an orthogonal map learnt within the principal subspace of the weight; the rest of the weight stays.

    W' = W + B (R - I) A,   A = S^(1-a) V',   B = U S^a,   U S V' the r largest singular triples of the base weight
    R = diag(beta) C diag(alpha),   C = (I + Q) (I - Q)^-1,   Q skew

`psoft_init`: a = 1, so that A is orthonormal; `pissa_init`: a = 1/2. Q holds r (r - 1) / 2 numbers that start at zero,
beta and alpha start at one, so training starts at the base model. With `use_cayley_neumann` C is a series in Q; without
`psoft_orth` it is any matrix. A and B come from the base weight and are not saved. Source: Wu et al. 2025, arXiv
2505.11235, section 4. Different from the peer: every layout; `psoft_alpha` has no effect, as there, where it cancels.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.draw import triplets
from ..core.homes import derived_again
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Site
from ..core.stack import Adapter, Stack
from ..core.terms import Between
from ..errors import PeftWarning
from ..kernels.rotations import cayley, series, skew
from ..target_config import check_series, choice, number, probability
from .additive import AdditiveConfig, AdditiveModel

NOTED = ("r", "psoft_alpha", "ab_svd_init", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed")  # as A and B are


@dataclass
class PsoftConfig(AdditiveConfig):
    """The configuration of PSOFT."""

    kind = "PSOFT"
    added = frozenset({"bias"})
    ranks = ("r", "num_cayley_neumann_terms", "psoft_svd_lowrank_niter")
    r: int = field(default=32, metadata=describe("Dimensions of the subspace."))
    psoft_alpha: int = field(default=32, metadata=describe("Kept for files: it cancels, and has no effect."))
    psoft_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of A, in [0, 1)."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    ab_svd_init: str = field(
        default="psoft_init", metadata=describe("Where S goes: to B ('psoft_init'), or half to each ('pissa_init').")
    )
    psoft_svd: str = field(default="full", metadata=describe("The decomposition: 'full', or random 'lowrank'."))
    psoft_svd_lowrank_niter: int = field(default=10, metadata=describe("Iterations of 'lowrank'."))
    random_seed: int = field(default=0, metadata=describe("Seed of 'lowrank'."))
    psoft_orth: bool = field(default=True, metadata=describe("C is orthogonal; else any matrix."))
    psoft_mag_b: bool = field(default=True, metadata=describe("Learn beta."))
    psoft_mag_a: bool = field(default=True, metadata=describe("Learn alpha."))
    use_cayley_neumann: bool = field(default=False, metadata=describe("A series instead of the inverse: faster."))
    num_cayley_neumann_terms: int = field(default=5, metadata=describe("Terms of the series."))
    cayley_neumann_eps: float | None = field(
        default=None, metadata=describe("The largest norm that Q has in the series, in (0, 1).")
    )
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else C is random."))

    def check(self) -> None:
        """Numbers and choices."""
        choice("ab_svd_init", self.ab_svd_init, ("psoft_init", "pissa_init"))
        choice("psoft_svd", self.psoft_svd, ("full", "lowrank"))
        probability("psoft_dropout", self.psoft_dropout)
        number("psoft_alpha", self.psoft_alpha)
        check_series(self, self.psoft_orth)
        if not 0 < (0.5 if (eps := self.cayley_neumann_eps) is None else eps) < 1:
            raise ValueError(f"cayley_neumann_eps={eps} must lie between 0 and 1, or be None for no limit.")
        if eps is not None and not self.use_cayley_neumann:
            text = "cayley_neumann_eps has no effect without the series. Set use_cayley_neumann=True."
            warnings.warn(text, PeftWarning, stacklevel=5)


class OrthLayer(nn.Module):
    """Holds the tensors of R under the names that checkpoints have."""

    def __init__(self, c: PsoftConfig, r: int, *lead: int, **kwargs: Any):
        super().__init__()
        shape = (r * (r - 1) // 2,) if c.psoft_orth else (r, r)
        self.weight = nn.Parameter(torch.zeros(*lead, *shape, **kwargs))
        for name, wanted in (("vector_b", c.psoft_mag_b), ("vector_a", c.psoft_mag_a)):
            if wanted:
                self.register_parameter(name, nn.Parameter(torch.ones(*lead, r, **kwargs)))


class PSOFT(Between):
    """W' = W + B (R - I) A."""

    dropout = "psoft_dropout"
    neutral_zeros, may_be_empty = False, frozenset({"psoft_R.weight"})  # empty where r is 1

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        if c.r > min(out, inp):
            least = f"the {min(out, inp)} directions of the weight of {site.path!r}"
            raise ValueError(f"r={c.r} is more than {least}. Lower r, for this layer alone by module_config.")
        R, noted = OrthLayer(c, c.r, *lead, **site.kwargs), {name: getattr(c, name) for name in NOTED}
        return {"psoft_dropout": site.dropout("psoft_dropout"), "psoft_R": R, **noted}

    def init(self, p: Adapter, inner: Stack) -> None:
        weight = p.psoft_R.weight
        if not p.settings.init_weights:
            weight.normal_(0, 0.1)
        if not p.settings.psoft_orth:
            weight.diagonal(dim1=-2, dim2=-1).add_(1)

    def derive(self, p: Adapter, inner: Stack) -> None:
        c, W = p.settings, p.original_weight().detach().float()  # of float64 too: its signs could be others
        dtype = p.psoft_R.weight.dtype
        if c.psoft_svd == "full":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, Vh = triplets(W, p.r, c.psoft_svd_lowrank_niter, c.random_seed)
        U, S, Vh = U[..., : p.r], S[..., : p.r], Vh[..., : p.r, :]
        down, up = (S.sqrt(), S.sqrt()) if c.ab_svd_init == "pissa_init" else (torch.ones_like(S), S)
        p.layer.keep(p, "psoft_A", (down[..., None] * Vh).to(dtype).contiguous())
        p.layer.keep(p, "psoft_B", (U * up[..., None, :]).to(dtype).contiguous())

    follow_base = derived_again

    def rotation(self, p: Adapter) -> Tensor:
        """R, (..., r, r)."""
        c, held, C = p.settings, p.held("psoft_R"), p.held("psoft_R").weight
        if c.psoft_orth:
            Q = skew(C, p.r)
            if c.cayley_neumann_eps is not None and c.use_cayley_neumann:
                Q = Q * (c.cayley_neumann_eps / (torch.linalg.matrix_norm(Q, keepdim=True) + 1e-12)).clamp_max(1)
            C = series(Q, c.num_cayley_neumann_terms) if c.use_cayley_neumann else cayley(-Q)
        C = C * held.vector_b[..., None] if c.psoft_mag_b else C
        return C * held.vector_a[..., None, :] if c.psoft_mag_a else C

    def middle(self, p: Adapter) -> tuple[Tensor, Tensor, Tensor]:
        R, A = self.rotation(p), p.held_buffer("psoft_A")
        return A, R - torch.eye(p.r, dtype=R.dtype, device=R.device), p.held_buffer("psoft_B")


class PsoftLayer(BaseTunerLayer):
    """A target under PSOFT adapters."""

    family = "psoft"
    adapter_layer_names = ("psoft_R",)
    other_param_names = (*NOTED, "psoft_dropout")
    _home_order = ("psoft_dropout", "psoft_R")


class PsoftModel(AdditiveModel):
    """PSOFT adapters on a model."""

    prefix = "psoft_"
    layer_classes = name_layers(PsoftLayer, globals())
    method: ClassVar[PSOFT] = PSOFT()
