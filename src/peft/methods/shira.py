"""SHiRA: a sparse update at fixed places.

    W' = W + s V,   V (out, in) is zero but for r (in + out) values at places that a mask chooses

The mask is random, from `random_seed`, or the user's own: `config.mask_fn(base_layer, r, **kwargs)` returns an
(out, in) tensor whose ones are the places. They are saved. V starts at zero, so training starts at the base model.
Source: Bhardwaj et al. 2024, arXiv 2406.13175.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core import draw
from ..core.layer import name_layers
from ..core.method import Site
from ..core.scale import ScaledLayer
from ..core.sparse import Sparse
from ..core.stack import Adapter, Stack
from ..errors import PeftWarning
from .additive import AdditiveConfig, AdditiveModel


@dataclass
class ShiraConfig(AdditiveConfig):
    """The configuration of SHiRA."""

    kind = "SHIRA"
    added = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "bias"})
    mask_fn: ClassVar[Callable[..., Tensor] | None] = None  # to be set on a configuration with a mask of one's own

    r: int = field(default=32, metadata=describe("r * (in + out) values are trained in each layer."))
    mask_type: str = field(default="random", metadata=describe("'random', or a name for the mask of one's own."))
    random_seed: int | None = field(default=None, metadata=describe("Seed of the random mask."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool = field(default=True, metadata=describe("Start at zero; else random."))

    def check(self) -> None:
        """A mask that is not random has to be given."""
        if self.mask_type != "random":
            text = (
                f"mask_type={self.mask_type!r} is a mask of one's own. Set `config.mask_fn` to a function "
                "(base_layer, r, **kwargs) that returns it, unless the places come with a checkpoint."
            )
            warnings.warn(text, PeftWarning, stacklevel=4)


class SHiRA(Sparse):
    """W' = W + s V."""

    linear: ClassVar[dict[str, float]] = {"shira_weight": 0.0}
    by_rows = False
    numbers_key, places_key = "shira_weight", "shira_indices"

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        n, r = c.r * (out + inp), out * inp // (out + inp)
        way = f"Use r={r} at most, for this layer alone with module_config" if r else ""
        draw.check_count(f"r * (in + out) with r={c.r}, that is n", n, out * inp, site.path, way)
        return {
            "shira_indices": nn.Buffer(torch.zeros(2, n, dtype=torch.int32, device=site.device)),
            "shira_weight": nn.Parameter(torch.empty(*lead, n, **site.kwargs)),
            "r": c.r,
            "scaling": 1.0,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        p.shira_weight.zero_() if p.settings.init_weights else p.shira_weight.normal_()
        *_, out, inp = inner.view.shape(inner.base)
        n, mask_fn = p.shira_weight.shape[-1], p.settings.mask_fn
        if mask_fn is not None:
            chosen = (mask_fn(inner.base, p.r) == 1).flatten().nonzero().flatten()
        elif p.settings.mask_type == "random":
            chosen = draw.places(out, inp, n, p.settings.random_seed).sort().values
        else:
            return
        if len(chosen) != n:
            raise ValueError(
                f"config.mask_fn gives {len(chosen)} places for {p.path!r}, but r={p.r} asks for {n}. A mask must hold "
                "r * (in + out) ones."
            )
        p.held_buffer("shira_indices").copy_(torch.stack([chosen // inp, chosen % inp]))

    def numbers(self, p: Adapter) -> Tensor:
        return super().numbers(p) * p.scaling

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        shape = p.layer.view.shape(p.layer.get_base_layer())
        return draw.scatter(self.numbers(p), p.held_buffer("shira_indices"), shape)[..., rows, :]


class ShiraLayer(ScaledLayer):
    """A target under SHiRA adapters."""

    family = "shira"
    adapter_layer_names = ("shira_weight",)
    other_param_names = ("r", "scaling", "shira_indices")
    _parameter_homes = frozenset({"shira_weight"})


class ShiraModel(AdditiveModel):
    """SHiRA adapters on a model."""

    prefix = "shira_"
    layer_classes = name_layers(ShiraLayer, globals())
    method: ClassVar[SHiRA] = SHiRA()
