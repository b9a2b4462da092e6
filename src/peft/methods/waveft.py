"""WaveFT: a sparse set of wavelet coefficients, whose inverse transform is the update.

    W' = W + s IDWT2(S),   S is zero but for c_l at n places of an (out, in) matrix that follow from a seed

The transform is one level of a separable wavelet; S is larger than W by what the filters overlap, with the places in
its middle, and the result is cut to (out, in). `use_idwt=False` adds s S itself. Only the coefficients are saved, and
start at zero, so training starts at the base model. Source: Bilican et al. 2025, arXiv 2505.12532. Different from the
peer: the filter of coif4 is the coiflet; there it is not orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core import draw
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Site
from ..core.shared import Shared
from ..core.sparse import Sparse
from ..core.stack import Adapter, Stack
from ..kernels import wavelet
from ..kernels.sparse import Places
from ..target_config import choice, number
from .additive import AdditiveConfig, AdditiveModel
from .wavelets import LOW, filters


@dataclass
class WaveFTConfig(AdditiveConfig):
    """The configuration of WaveFT."""

    kind = "WAVEFT"
    ranks = ("n_frequency",)
    n_frequency: int = field(default=2592, metadata=describe("How many coefficients are trained in each layer."))
    scaling: float = field(default=25.0, metadata=describe("Factor of the update."))
    wavelet_family: str = field(default="db1", metadata=describe("db1 to db10, sym2 to sym10, or coif1 to coif5."))
    use_idwt: bool = field(default=True, metadata=describe("Transform the coefficients; else they are the update."))
    random_loc_seed: int = field(default=777, metadata=describe("Seed of the places of the coefficients."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    n_frequency_pattern: dict | None = field(
        default_factory=dict,
        metadata=describe("Values that differ from n_frequency: {regular expression of names: number}."),
    )
    proportional_parameters: bool = field(
        default=False, metadata=describe("Share the coefficients of all layers out by the size of their weights.")
    )
    init_weights: bool = field(default=True, metadata=describe("Start at zero; else random."))

    def check(self) -> None:
        """Numbers and choices."""
        number("scaling", self.scaling)
        choice("wavelet_family", self.wavelet_family, tuple(LOW))


class WaveFT(Sparse):
    """W' = W + s IDWT2(S)."""

    linear: ClassVar[dict[str, float]] = {"waveft_spectrum": 0.0}
    by_rows = False
    numbers_key = "waveft_spectrum"
    places_key = "waveft_indices"
    whole_from = ((4.5, 0), (8.0, 0))

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]]) -> dict[str, Shared]:
        """Nothing but a note on the configuration: how many coefficients each element of a weight gets."""
        sizes = [out * inp for *_, out, inp in shapes] if settings.proportional_parameters else []
        settings.__dict__["per_element"] = settings.n_frequency * len(sizes) / sum(sizes) if sizes else None
        return {}

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        share = c.__dict__.get("per_element")
        n = c.n_frequency if share is None else max(1, round(out * inp * share))
        way = f"Use at most {out * inp}, for this layer alone with n_frequency_pattern"
        draw.check_count("n_frequency", n, out * inp, site.path, way)
        return {
            "waveft_spectrum": nn.Parameter(torch.empty(*lead, n, **site.kwargs)),
            "waveft_n_frequency": n,
            "waveft_scaling": c.scaling,
            "waveft_random_loc_seed": c.random_loc_seed,
            "waveft_wavelet_family": c.wavelet_family,
            "waveft_use_idwt": c.use_idwt,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        p.waveft_spectrum.zero_() if p.settings.init_weights else p.waveft_spectrum.normal_(std=0.01)

    def derive(self, p: Adapter, inner: Stack) -> None:
        *_, out, inp = inner.view.shape(inner.base)
        device = p.layer.original_weight_device()
        flat = draw.places(out, inp, p.waveft_n_frequency, p.waveft_random_loc_seed)
        p.layer.keep(p, "waveft_indices", torch.stack([flat // inp, flat % inp]).to(device))
        dtype = torch.promote_types(p.waveft_spectrum.dtype, torch.float32)
        pair = torch.tensor(filters(p.waveft_wavelet_family), dtype=dtype, device=device)
        p.layer.keep(p, "waveft_filters", pair)

    def numbers(self, p: Adapter) -> Tensor:
        c = p.held("waveft_spectrum") * p.waveft_scaling
        return c.to(p.held_buffer("waveft_filters").dtype) if p.waveft_use_idwt else c

    def placed(self, p: Adapter, held: Tensor, shape: tuple[int, int]) -> Places | None:
        if not p.waveft_use_idwt:
            return None
        at, sizes = wavelet.placed(held, *shape, p.held_buffer("waveft_filters").shape[-1])
        return Places(held, *wavelet.separate(at, sizes), sizes)

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        at, (*lead, out, inp) = p.held_buffer("waveft_indices"), p.layer.view.shape(p.layer.get_base_layer())
        if not p.waveft_use_idwt:
            return draw.scatter(self.numbers(p), at, (*lead, out, inp))[..., rows, :]
        pair = p.held_buffer("waveft_filters")
        at, sizes = wavelet.placed(at, out, inp, pair.shape[-1])
        S = draw.scatter(self.numbers(p), at, (*lead, *sizes))
        return wavelet.inverse(S, pair)[..., :out, :inp][..., rows, :].to(p.held("waveft_spectrum").dtype)

    def taken(self, p: Adapter, x: Tensor) -> Tensor:
        return wavelet.analysis(x, p.held_buffer("waveft_filters")) if p.waveft_use_idwt else super().taken(p, x)

    def given(self, p: Adapter, t: Tensor, out: int) -> Tensor:
        if not p.waveft_use_idwt:
            return super().given(p, t, out)
        return wavelet.synthesis(t, p.held_buffer("waveft_filters"))[:, :out]


class WaveFTLayer(BaseTunerLayer):
    """A target under WaveFT adapters."""

    family = "waveft"
    adapter_layer_names = ("waveft_spectrum",)
    other_param_names = (
        "waveft_n_frequency",
        "waveft_scaling",
        "waveft_random_loc_seed",
        "waveft_wavelet_family",
        "waveft_indices",
        "waveft_use_idwt",
    )
    _parameter_homes = frozenset({"waveft_spectrum"})


class WaveFTModel(AdditiveModel):
    """WaveFT adapters on a model."""

    prefix = "waveft_"
    layer_classes = name_layers(WaveFTLayer, globals(), "WaveFT")
    method: ClassVar[WaveFT] = WaveFT()
