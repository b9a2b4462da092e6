"""GLoRA: the weight is scaled and shifted, element by element, and the bias is scaled, shifted and fed with the weight.

    W' = W + W0 * A + B,   b' = b + b0 * D + E + W0 C,   W0 and b0 those of the base

Each of A to E takes a form: `lora` Xd Xu of rank r, `vector` one number per row, `constant` one number, or `none`.
Without a bias in the layer there is no C, D or E. Xd and X start at zero, so training starts at the base model.
Source: Chavan et al. 2023, arXiv 2306.07967, eq. 4. Different from the peer: every layout, each adapter relative to the
base weight also in unmerging, and bf16 weights do not round the update away in the forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.draw import kaiming
from ..core.layer import BaseTunerLayer, name_layers
from ..core.method import Delta, Site
from ..core.stack import Adapter, Stack
from ..target_config import choice
from .additive import AdditiveConfig, AdditiveModel

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


class GloraPath(nn.Module):
    """Holds one of A to E under the names that checkpoints have."""

    def value(self, rows: slice = slice(None)) -> Tensor | None:
        """What it stands for, or these rows of it; None for zero."""
        return None

    def start(self, at_base: bool) -> None:
        """First values: of the base model, or random ones."""


class GloraLoraPath(GloraPath):
    """Xd Xu."""

    def __init__(self, lead: list[int], out: int, inp: int, r: int, **kwargs: Any):
        super().__init__()
        self.Xd = nn.Parameter(torch.empty(*lead, out, r, **kwargs))
        self.Xu = nn.Parameter(torch.empty(*lead, r, inp, **kwargs))

    def value(self, rows: slice = slice(None)) -> Tensor:
        return self.Xd[..., rows, :] @ self.Xu

    def start(self, at_base: bool) -> None:
        kaiming(self.Xu)
        self.Xd.zero_() if at_base else kaiming(self.Xd)


class GloraVectorPath(GloraPath):
    """A number per row: a column, or (n,)."""

    def __init__(self, *shape: int, **kwargs: Any):
        super().__init__()
        self.X = nn.Parameter(torch.empty(shape, **kwargs))

    def value(self, rows: slice = slice(None)) -> Tensor:
        return self.X[..., rows, :] if self.X.dim() > 1 else self.X

    def start(self, at_base: bool) -> None:
        bound = 1 / math.sqrt(self.X.shape[-1])
        self.X.zero_() if at_base else self.X.uniform_(-bound, bound)


class GloraScalarPath(GloraVectorPath):
    """One number."""

    def __init__(self, **kwargs: Any):
        super().__init__(1, **kwargs)

    def start(self, at_base: bool) -> None:
        self.X.zero_() if at_base else self.X.normal_(0, 0.02)


class GloraEmptyPath(GloraPath):
    """Zero, which files hold in full."""

    def __init__(self, *shape: int, **kwargs: Any):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(shape, **kwargs))


class GLoRA(Delta):
    """W' = W + W0 * A + B."""

    def build(self, site: Site) -> dict[str, Any]:
        c, kwargs = site.settings, site.kwargs
        *lead, out, inp = site.view.shape(site.module)

        def path(form: str, column: bool, *shape: int) -> GloraPath:
            if form == "lora":
                return GloraLoraPath(lead, *shape, c.r, **kwargs)
            if form == "vector":
                return GloraVectorPath(*lead, *((shape[0], 1) if column else shape), **kwargs)
            return GloraScalarPath(**kwargs) if form == "constant" else GloraEmptyPath(*lead, *shape, **kwargs)

        biased = site.view.bias(site.module) is not None
        of_c, of_d = (c.config_C, c.config_D_E) if biased else ("none", "none")
        weights = [path(c.config_A_B, True, out, inp) for _ in "AB"]
        paths = [*weights, path(of_c, True, inp, 1), *(path(of_d, False, out) for _ in "DE")]
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
    _home_order = HOMES


class GloraModel(AdditiveModel):
    """GLoRA adapters on a model."""

    prefix = "glora_"
    layer_classes = name_layers(GloraLayer, globals(), "Glora")
    method: ClassVar[GLoRA] = GLoRA()
