"""FourierFT: a sparse spectrum, whose inverse Fourier transform is the update.

    W' = W + s Re(IDFT(S)),   S (out, in) is zero but for c_l at n places that follow from a seed

The transform is of both axes, divided by out * in. Only the coefficients are saved; layers of equal shape share the
places. The default start is random, c ~ N(0, 1), so that a new adapter changes the model; `init_weights=True` starts
at zero. Source: Gao et al. 2024, arXiv 2405.03003, eq. 2-4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core import draw
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Site
from ..core.sparse import Sparse
from ..core.stack import Adapter, Stack
from ..kernels.modes import lasting, ordinary, single
from ..kernels.sparse import Places
from ..target_config import number
from .additive import AdditiveConfig, AdditiveModel


@dataclass
class FourierFTConfig(AdditiveConfig):
    """The configuration of FourierFT."""

    kind = "FOURIERFT"
    ranks = ("n_frequency",)
    below = frozenset({"n_frequency_pattern"})
    n_frequency: int = field(default=1000, metadata=describe("How many coefficients are trained in each layer."))
    scaling: float = field(default=150.0, metadata=describe("Factor of the update."))
    random_loc_seed: int | None = field(default=777, metadata=describe("Seed of the places of the coefficients."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    n_frequency_pattern: dict | None = field(
        default_factory=dict,
        metadata=describe("Values that differ from n_frequency: {regular expression of names: number}."),
    )
    init_weights: bool = field(default=False, metadata=describe("Start at zero; else random."))

    def check(self) -> None:
        """Numbers."""
        number("scaling", self.scaling)


class FourierFT(Sparse):
    """W' = W + s Re(IDFT(S))."""

    linear: ClassVar[dict[str, float]] = {"fourierft_spectrum": 0.0}
    by_rows = False
    numbers_key = "fourierft_spectrum"
    places_key = "indices"
    whole_from = ((2.0, 12_000), (3.0, 80_000))

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        way = f"Use at most {out * inp}, for this layer alone with n_frequency_pattern"
        draw.check_count("n_frequency", c.n_frequency, out * inp, site.path, way)
        return {
            "fourierft_spectrum": nn.Parameter(torch.empty(*lead, c.n_frequency, **site.kwargs)),
            "fourierft_n_frequency": c.n_frequency,
            "fourierft_scaling": c.scaling,
            "fourierft_random_loc_seed": c.random_loc_seed,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        p.fourierft_spectrum.zero_() if p.settings.init_weights else p.fourierft_spectrum.normal_()

    def derive(self, p: Adapter, inner: Stack) -> None:
        *_, out, inp = inner.view.shape(inner.base)
        flat = draw.places(out, inp, p.fourierft_n_frequency, p.fourierft_random_loc_seed)
        found = torch.stack([flat // inp, flat % inp])
        p.layer.keep(p, "indices", found.to(p.layer.original_weight_device()))

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        c = p.held("fourierft_spectrum")
        *lead, out, inp = p.layer.view.shape(p.layer.get_base_layer())
        at, inside = self._halves(p, (out, inp))
        values = (single(c).unsqueeze(-2) * inside).flatten(-2)
        S = values.new_zeros(*lead, out * (inp // 2 + 1)).index_add(-1, at, values, alpha=p.fourierft_scaling / 2)
        return torch.fft.irfft2(S.unflatten(-1, (out, -1)), s=(out, inp))[..., rows, :].to(c.dtype)

    def _halves(self, p: Adapter, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`halves` of the places, kept while they stay."""
        held = p.held_buffer("indices")
        if not lasting():
            return halves(held.long(), *shape)
        found = p.cache.get("halves")
        if found is None or not found[0].of(held):
            with ordinary():
                found = p.cache["halves"] = (Places(held), halves(held.long(), *shape))
        return found[1]

    def numbers(self, p: Adapter) -> Tensor:
        return single(p.held("fourierft_spectrum")) * p.fourierft_scaling

    def placed(self, p: Adapter, at: Tensor, shape: tuple[int, int]) -> Places:
        """S acts on the real parts of half a spectrum and on the imaginary ones below; the other half is conjugate."""
        (u, v), (out, inp) = at.long(), shape
        (k, up), (d, down) = half(u, out), half(v, inp)
        twice = (k > 0) & (2 * k != out)  # what stands for two frequencies
        real = torch.where(twice, 0.5, 1.0).to(single(p.held("fourierft_spectrum")).dtype) / inp
        gains = torch.stack([real, torch.where(twice, -real * up * down, 0.0)])
        rows, columns = torch.cat([k, k + out // 2 + 1]), torch.cat([d, d + inp // 2 + 1])
        return Places(at, rows, columns, (2 * (out // 2 + 1), 2 * (inp // 2 + 1)), gains)

    def taken(self, p: Adapter, x: Tensor) -> Tensor:
        X = torch.fft.rfft(x)
        return torch.cat([X.real.mT, X.imag.mT])

    def given(self, p: Adapter, t: Tensor, out: int) -> Tensor:
        pairs = torch.stack(t.mT.chunk(2, -1), -1)  # `torch.complex` would keep both for its derivative
        return torch.fft.irfft(torch.view_as_complex(pairs), out)


def halves(at: Tensor, out: int, inp: int) -> tuple[Tensor, Tensor]:
    """Re(IDFT(S)) has a spectrum whose halves are conjugate: half a number at (u, v) and at (-u, -v). Where those stand
    in the first half, (2 n), and whether they do, (2, n)."""
    (u, v), columns = torch.stack([at, torch.stack([-at[0] % out, -at[1] % inp])], 1), inp // 2 + 1
    return torch.where(v < columns, u * columns + v, 0).flatten(), v < columns


def half(at: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Frequencies of n as those of half a spectrum, and -1 where they are conjugate to these, else 1."""
    other = at > n // 2
    return torch.where(other, n - at, at), torch.where(other, -1, 1)


class FourierFTLayer(BaseTunerLayer):
    """A target under FourierFT adapters."""

    family = "fourierft"
    adapter_layer_names = ("fourierft_spectrum",)
    other_param_names = ("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed", "indices")
    _parameter_homes = frozenset({"fourierft_spectrum"})


class FourierFTModel(AdditiveModel):
    """FourierFT adapters on a model."""

    prefix = "fourierft_"
    layer_classes = name_layers(FourierFTLayer, globals(), "FourierFT")
    method: ClassVar[FourierFT] = FourierFT()
