"""VeRA: random matrices that all layers share, frozen, and two learnt vectors for each layer.

    W' = W + diag(b) B diag(d) A,   A (r, in), B (out, r): the first columns and rows of one pair for the whole model

b starts at zero, so training starts at the base model. A and B come from a seed, and files may leave them out. Source:
Kopiczko et al. 2023, arXiv 2310.11454, eq. 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import describe
from ..core.direct import open_linear
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import LowRank, Site
from ..core.shared import Shared, drawn
from ..core.stack import Adapter, Stack
from ..errors import PeftWarning
from ..kernels import onto, vectors
from ..target_config import probability
from .additive import AdditiveConfig, AdditiveModel


@dataclass
class VeraConfig(AdditiveConfig):
    """The configuration of VeRA."""

    kind = "VERA"
    added = frozenset({"exclude_modules"})
    r: int = field(default=256, metadata=describe("Rank of the shared matrices."))
    projection_prng_key: int = field(default=0, metadata=describe("Seed of the shared matrices."))
    save_projection: bool = field(default=True, metadata=describe("Keep the shared matrices in files."))
    vera_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of A, in [0, 1)."))
    d_initial: float = field(default=0.1, metadata=describe("First value of d."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))

    def check(self) -> None:
        """Numbers, and a word about what files will lack."""
        probability("vera_dropout", self.vera_dropout)
        warn_unsaved(self, "vera_A and vera_B")


def warn_unsaved(config: Any, names: str, seed: str = "projection_prng_key") -> None:
    """Say what files will lack under save_projection=False."""
    if not config.save_projection:
        text = (
            f"save_projection=False keeps {names} out of files; they are drawn again from {seed}, which gives the same "
            "numbers only where the generator is the same."
        )
        warnings.warn(text, PeftWarning, stacklevel=6)


class VeRA(LowRank):
    """W' = W + diag(b) B diag(d) A."""

    word = "vera"
    dropout = "vera_dropout"
    sums_from = 1.5
    rows = 1  # of A for each of B's columns

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]]) -> dict[str, Shared]:
        (out, inp), r = map(max, zip(*(s[-2:] for s in shapes), strict=True)), settings.r
        names, of_a, of_b = (f"{self.word}_A", f"{self.word}_B"), (self.rows * r, inp), (out, r)
        generator = torch.Generator().manual_seed(settings.projection_prng_key)
        pair = drawn(of_a, (6 / inp) ** 0.5, generator), drawn(of_b, (6 / r) ** 0.5, generator)
        return {name: Shared(t, settings.save_projection) for name, t in zip(names, pair, strict=True)}

    def build(self, site: Site) -> dict[str, Any]:
        c, word = site.settings, self.word
        *lead, out, _ = site.view.shape(site.module)
        d = torch.full((*lead, self.rows * c.r), float(c.d_initial), **site.kwargs)
        return {
            self.dropout: site.dropout(self.dropout),
            f"{word}_lambda_b": nn.Parameter(torch.zeros(*lead, out, **site.kwargs)),
            f"{word}_lambda_d": nn.Parameter(d),
            "r": c.r,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        if not p.settings.init_weights:
            p.held(f"{self.word}_lambda_b").fill_(1)
            p.held(f"{self.word}_lambda_d").normal_()

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        b = p.held(f"{self.word}_lambda_b")
        B = getattr(p, f"{self.word}_B").to(b.device, b.dtype)
        return self.down(p, slice(p.r)), b[..., None] * B[: b.shape[-1], : p.r]

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held = open_linear(inner, x) if type(self).onto is LowRank.onto else None
        called = type(self).onto is LowRank.onto and self.apart_from(p, inner)
        return self.apart(p, inner, x, held) if held is not None or called else super().at_once(p, inner, x)

    def apart_from(self, p: Adapter, inner: Stack) -> bool:
        """Whether the update may stand beside what the layer gives, be it quantised, hooked, or under autocast."""
        return inner.view.dense and p.held(f"{self.word}_lambda_b").dim() == 1

    def apart(self, p: Adapter, inner: Stack, x: Tensor, held: tuple[Tensor, Tensor | None] | None) -> Tensor:
        """The same: A and B have no gradients, so that d and b are better apart from them; without W and b in `held`
        the layer is called."""
        b, d = p.held(f"{self.word}_lambda_b"), p.held(f"{self.word}_lambda_d")
        A, B = getattr(p, f"{self.word}_A"), getattr(p, f"{self.word}_B")
        if A.dtype is not b.dtype or A.device != b.device:
            A, B = A.to(b.device, b.dtype), B.to(b.device, b.dtype)
        rate, rows = self.drop_rate(p), self.wanted(p)
        A, B = A[:rows, : x.shape[-1]], B[: b.shape[-1], : p.r]
        if held is not None and rows == p.r and not rate and type(self).middle is VeRA.middle:
            return vectors.linear(x, *held, A, d, B, b)
        z, _ = inner.drop(x, rate, d.dtype)
        u = F.linear(self.middle(p, F.linear(z, A), d if rows == self.rows * p.r else d[:rows]), B)
        if held is not None:
            return onto.features(F.linear(x, *held), u, b)
        y = inner(x)
        return (y + u * b).to(y.dtype)

    def wanted(self, p: Adapter) -> int:
        """How many rows of A this forward takes."""
        return self.rows * p.r

    def middle(self, p: Adapter, h: Tensor, d: Tensor) -> Tensor:
        """What B is given, of h = A x."""
        return h * d

    def down(self, p: Adapter, rows: slice) -> Tensor:
        """These rows of diag(d) A, (..., rows, I)."""
        d = p.held(f"{self.word}_lambda_d")
        inp = p.layer.view.shape(p.layer.get_base_layer())[-1]
        A = getattr(p, f"{self.word}_A").to(d.device, d.dtype)
        return d[..., rows, None] * A[rows, :inp]


class VeraLayer(BaseTunerLayer):
    """A target under VeRA adapters."""

    family = "vera"
    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    other_param_names = ("r", "vera_dropout")
    _home_order = ("vera_dropout", "vera_lambda_b", "vera_lambda_d")
    _parameter_homes = frozenset({"vera_lambda_b", "vera_lambda_d"})


class VeraModel(AdditiveModel):
    """VeRA adapters on a model."""

    prefix = "vera_lambda_"
    uses_shared_state = True
    layer_classes = name_layers(VeraLayer, globals())
    method: ClassVar[VeRA] = VeRA()
