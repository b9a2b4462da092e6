"""GLoRA: the weight is scaled and shifted, element by element, and the bias is scaled, shifted and fed with the weight.

    W' = W + W0 * A + B,   b' = b + b0 * D + E + W0 C,   W0 and b0 those of the base

Each of A to E takes a form: `lora` Xd Xu of rank r, `vector` one number per row, `constant` one number, or `none`.
Without a bias in the layer there is no C, D or E. Xd and X start at zero, so training starts at the base model.
Source: Chavan et al. 2023, arXiv 2306.07967, eq. 4. Different from the peer: every layout, each adapter relative to the
base weight also in unmerging, and bf16 weights do not round the update away in the forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import describe
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Delta, Site
from ..core.stack import Adapter, Stack
from ..target_config import choice
from .additive import AdditiveConfig, AdditiveModel
from .glora_paths import path

HOMES = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")


@dataclass
class GloraConfig(AdditiveConfig):
    """The configuration of GLoRA."""

    kind = "GLORA"
    added = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    r: int = field(default=8, metadata=describe("Rank of the tensors of form 'lora'."))
    config_A_B: str = field(
        default="lora", metadata=describe("Form of A and B: 'lora', 'vector', 'constant' or 'none'.")
    )
    config_C: str = field(default="lora", metadata=describe("Form of C: 'lora', 'vector' or 'none'."))
    config_D_E: str = field(default="constant", metadata=describe("Form of D and E: 'vector', 'constant' or 'none'."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else all at random."))

    def check(self) -> None:
        """Choices."""
        choice("config_A_B", self.config_A_B, ("lora", "vector", "constant", "none"))
        choice("config_C", self.config_C, ("lora", "vector", "none"))
        choice("config_D_E", self.config_D_E, ("vector", "constant", "none"))


class GLoRA(Delta):
    """W' = W + W0 * A + B."""

    reads = True

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        of_c, of_d = ("none",) * 2 if site.view.bias(site.module) is None else (c.config_C, c.config_D_E)
        weight = (c.config_A_B, *lead, out, inp)
        stated: list[Any] = [weight, weight, (of_c, *lead, inp, 1), (of_d, *lead, out), (of_d, *lead, out)]
        paths = [path(c.r, form, shape, len(lead), **site.kwargs) for form, *shape in stated]
        return {**dict(zip(HOMES, paths, strict=True)), "r": c.r}

    def init(self, p: Adapter, inner: Stack) -> None:
        for name in HOMES:
            p.held(name).start(p.settings.init_weights)

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        scale, shift = (p.held(name).value(rows) for name in HOMES[:2])
        if scale is None or shift is None:
            return torch.zeros_like(W)
        return p.original_weight()[..., rows, :].to(scale.dtype) * scale + shift

    def shift(self, p: Adapter) -> Tensor | None:
        """b' - b, (O,); None where the layer has no bias or nothing changes it."""
        b = p.layer.original_bias()
        if b is None:
            return None
        C, D, E = (p.held(name).value() for name in HOMES[2:])
        found = None if D is None else b.to(D.dtype) * D + E
        if C is not None:
            fed = (p.original_weight().to(C.dtype) @ C).squeeze(-1)
            found = fed if found is None else found + fed
        return found

    def bias(self, p: Adapter, b: Tensor | None) -> Tensor | None:
        shift = None if b is None else self.shift(p)
        return b if b is None or shift is None else (b + shift).to(b.dtype)

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        y, shift = super().onto(p, inner, y, x), self.shift(p)
        return y if shift is None else (y + inner.spread(shift)).to(y.dtype)


class GloraLayer(BaseTunerLayer):
    """A target under GLoRA adapters."""

    family = "glora"
    adapter_layer_names = HOMES
    other_param_names = ("r",)


class GloraModel(AdditiveModel):
    """GLoRA adapters on a model."""

    prefix = "glora_"
    layer_classes = name_layers(GloraLayer, globals(), "Glora")
    method: ClassVar[GLoRA] = GLoRA()
