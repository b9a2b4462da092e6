"""MiSS: one shard of rows, shared by all in-features; known as Bone before.

    W'[:, j] = W[:, j] + D[j mod r]',   D (r, out):  the layer sees the sum of its input's parts of r features, times D

`init_weights="mini"` holds D (r, mini_r), tiled to `out` columns. `init_weights="bat"` mixes the base weight in: with
W cut into blocks of r x r,  W'_uv = W_uv + W_uv D_u + D_u,  D (out / r, r, r). D starts at zero, so training starts at
the base model. Source: Kang and Yin 2024, arXiv 2409.15371.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..config import describe
from ..core import draw
from ..core.direct import open_linear
from ..core.layer import name_layers
from ..core.method import Delta, Method, Site
from ..core.scale import ScaledLayer
from ..core.stack import Adapter, Stack
from ..kernels import onto
from ..target_config import choice, probability
from .additive import AdditiveConfig, AdditiveModel
from .bat import Bat, build, refuse


@dataclass
class MissConfig(AdditiveConfig):
    """The configuration of MiSS."""

    kind = "MISS"
    ranks, counts = ("r", "mini_r"), {"init_weights": ("mini",)}
    r: int = field(default=64, metadata=describe("Rows of the shard."))
    miss_dropout: float = field(default=0.0, metadata=describe("Dropout of the adapter's input; not for 'bat'."))
    mini_r: int = field(default=1, metadata=describe("Columns of the shard under init_weights='mini'."))
    init_weights: bool | Literal["bat", "mini"] = field(
        default=True, metadata=describe("True or False: zero or random; 'bat', 'mini': another form of the update.")
    )

    def check(self) -> None:
        """Numbers and choices."""
        choice("init_weights", self.init_weights, (True, False, "bat", "mini"))
        probability("miss_dropout", self.miss_dropout)


class MiSS(Delta):
    """W'[:, j] = W[:, j] + D[j mod r]'."""

    dropout = "miss_dropout"
    sums_from = 1.5

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *_, out, inp = site.view.shape(site.module)
        if c.r > inp:
            raise ValueError(f"r={c.r} is larger than the {inp} in-features of {site.path!r}. Use at most {inp}.")
        if c.init_weights != "mini":
            return build(site, c.r, out)
        refuse(site, "mini_r", c.mini_r, out=out)
        return build(site, c.r, c.mini_r)

    def init(self, p: Adapter, inner: Stack) -> None:
        p.miss_block.zero_() if p.settings.init_weights else draw.kaiming(p.miss_block)

    def shard(self, p: Adapter) -> Tensor:
        """D, (..., r, O)."""
        D = p.held("miss_block")
        if p.settings.init_weights != "mini":
            return D
        return D.repeat(*[1] * (D.dim() - 1), p.layer.view.shape(p.layer.get_base_layer())[-2] // D.shape[-1])

    def delta(self, p: Adapter, W: Tensor, rows: slice = slice(None)) -> Tensor:
        D, inp = self.shard(p).mT[..., rows, :] * p.scaling, p.layer.view.shape(p.layer.get_base_layer())[-1]
        return D.repeat(*[1] * (D.dim() - 1), -(-inp // p.miss_r))[..., :inp]

    def exact_factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """A repeats the identity, B is D'."""
        B, inp = self.shard(p).mT * p.scaling, p.layer.view.shape(p.layer.get_base_layer())[-1]
        A = torch.eye(p.miss_r, dtype=B.dtype, device=B.device).repeat(1, -(-inp // p.miss_r))[:, :inp]
        return A.expand(*B.shape[:-2], -1, -1), B

    def at_once(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
        held = open_linear(inner, x) if type(self).onto is MiSS.onto else None
        if held is None:
            return None
        h, D = self.summed(p, inner, x), p.held("miss_block")
        if p.settings.init_weights == "mini" and not torch.is_grad_enabled():
            return onto.repeated(x, *held, h, D, p.scaling)
        return onto.thin(x, *held, (h, self.shard(p), p.scaling))

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if not inner.view.dense:
            return super().onto(p, inner, y, x)
        return (y + (self.summed(p, inner, x) @ self.shard(p) * p.scaling).view(y.shape)).to(y.dtype)

    def summed(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        """The sum of x's parts, (N, r)."""
        return onto.shards(inner.drop(x, self.drop_rate(p), p.held("miss_block").dtype)[0], p.miss_r)


class MissLayer(ScaledLayer):
    """A target under MiSS adapters."""

    family = "miss"
    adapter_layer_names = ("miss_block",)
    other_param_names = ("miss_r", "miss_dropout", "miss_mini_r", "scaling")
    _home_order = ("miss_dropout", "miss_block")
    _parameter_homes = frozenset({"miss_block"})


class MissModel(AdditiveModel):
    """MiSS adapters on a model."""

    prefix, older_names = "miss_", {"bone_block": "miss_block"}
    layer_classes = name_layers(MissLayer, globals(), "Miss")
    method: ClassVar[MiSS] = MiSS()
    bat: ClassVar[Bat] = Bat()

    @classmethod
    def plain_method_of(cls, settings: Any) -> Method:
        """The form that `init_weights` names."""
        return cls.bat if settings.init_weights == "bat" else cls.method
