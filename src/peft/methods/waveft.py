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
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import describe
from ..core import draw
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Delta, Site
from ..core.shared import Shared
from ..core.stack import Adapter, Stack
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


class WaveFT(Delta):
    """W' = W + s IDWT2(S)."""

    linear: ClassVar[dict[str, float]] = {"waveft_spectrum": 0.0}
    by_rows = False

    def shared(self, settings: Any, shapes: Iterator[tuple[int, ...]], known: dict[str, Tensor]) -> dict[str, Shared]:
        """Nothing but a note on the configuration: how many coefficients each element of a weight gets."""
        sizes = [out * inp for *_, out, inp in shapes] if settings.proportional_parameters else []
        settings.__dict__["per_element"] = settings.n_frequency * len(sizes) / sum(sizes) if sizes else None
        return {}

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        share = c.__dict__.get("per_element")
        n = c.n_frequency if share is None else max(1, round(out * inp * share))
        draw.check_count("n_frequency", n, out * inp, site.path)
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

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        c, at = p.held("waveft_spectrum"), p.held_buffer("waveft_indices")
        *lead, out, inp = p.layer.view.shape(p.layer.get_base_layer())
        values = c * p.waveft_scaling
        if not p.waveft_use_idwt:
            return draw.scatter(values, at, (*lead, out, inp))[..., rows, :]
        pair = p.held_buffer("waveft_filters")
        height, width = (n + pair.shape[-1] - 2 + (n + pair.shape[-1]) % 2 for n in (out, inp))
        at = torch.stack([at[0] + (height - out) // 2, at[1] + (width - inp) // 2])
        S = draw.scatter(values.to(pair.dtype), at, (*lead, height, width))
        return inverse(S, pair)[..., :out, :inp][..., rows, :].to(c.dtype)


def inverse(S: Tensor, pair: Tensor) -> Tensor:
    """One level of the inverse transform of (..., H, W), both even: approximation, and details of rows, columns, both.

    In the four quarters of S the details of rows stand on the right and those of columns below.
    """
    (a, rows), (columns, both) = (half.chunk(2, -1) for half in S.chunk(2, -2))
    left, right = synthesis(a, rows, pair), synthesis(columns, both, pair)
    return synthesis(left.mT, right.mT, pair).mT


def synthesis(low: Tensor, high: Tensor, pair: Tensor) -> Tensor:
    """Reconstruct (..., 2 n - L + 2, m) along the next to last axis from two halves (..., n, m)."""
    both = torch.stack([low, high], -3).reshape(-1, 2, *low.shape[-2:])
    length = pair.shape[-1]
    found = F.conv_transpose2d(both, pair.view(2, 1, length, 1), stride=(2, 1), padding=(length - 2, 0))
    return found.view(*low.shape[:-2], *found.shape[-2:])


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
    _home_order = ("waveft_spectrum",)
    _parameter_homes = frozenset({"waveft_spectrum"})


class WaveFTModel(AdditiveModel):
    """WaveFT adapters on a model."""

    prefix = "waveft_"
    layer_classes = name_layers(WaveFTLayer, globals(), "WaveFT")
    method: ClassVar[WaveFT] = WaveFT()
