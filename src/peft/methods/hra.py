"""HRA: the in-features of a weight reflected in learnt mirrors, one after the other.

    W' = W H,   H = (I - 2 u_1 u_1') .. (I - 2 u_r u_r'),   each u of length one

The mirrors start in equal pairs, which undo each other, so training starts at the base model; r is even for that. With
`apply_GS` they are made orthogonal first, H = I - 2 Q Q', which is never the identity. Either H is I - U T U' with a
small T, so it is applied without r passes over the weight. Source: Yuan et al. 2024, arXiv 2405.17484, section 3.

Different from the peer: with `apply_GS` the first mirrors are drawn one by one, not in pairs, whose second would be
rounding noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import describe
from ..core.draw import kaiming
from ..core.layer import name_layers
from ..core.method import Site
from ..core.rotation import Rotation
from ..core.scale import UnscaledLayer
from ..core.stack import Adapter, Stack
from ..core.tuner import BaseTuner
from ..errors import PeftWarning, report
from ..kernels.modes import NARROW, exported
from ..target_config import TargetConfig, choice


@dataclass
class HRAConfig(TargetConfig):
    """The configuration of HRA."""

    kind = "HRA"
    r: int = field(default=8, metadata=describe("Number of mirrors, even so that training starts at the base model."))
    apply_GS: bool = field(default=False, metadata=describe("Make the mirrors orthogonal to each other."))
    init_weights: bool = field(default=True, metadata=describe("Start with equal pairs of mirrors; else random."))

    def check(self) -> None:
        """Switches are True or False."""
        choice("init_weights", self.init_weights, (True, False))
        choice("apply_GS", self.apply_GS, (True, False))


class HRA(Rotation):
    """W' = W H."""

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        *lead, out, inp = site.view.shape(site.module)
        n = out if site.view.infix else inp
        if c.apply_GS and c.r > n:
            raise ValueError(
                f"r={c.r} mirrors cannot be orthogonal among the {n} features of {site.path!r}. Use r={n} or less, or "
                "apply_GS=False."
            )
        return {
            "hra_u": nn.Parameter(torch.empty(*lead, n, c.r, **site.kwargs)),
            "hra_r": c.r,
            "hra_apply_GS": c.apply_GS,
        }

    def init(self, p: Adapter, inner: Stack) -> None:
        u = p.hra_u
        if not p.settings.init_weights or p.hra_apply_GS or p.hra_r % 2:
            kaiming(u)
            if p.settings.init_weights:
                odd = "apply_GS=True" if p.hra_apply_GS else f"an odd r={p.hra_r}"
                text = f"HRA with {odd} does not start at the base model. Use an even r and apply_GS=False for that."
                report(PeftWarning, text, strict=False, stacklevel=9)
            return
        half = u[..., ::2].clone()
        kaiming(half)
        u.copy_(half.repeat_interleave(2, -1))

    def rotate(self, p: Adapter, t: Tensor, back: bool = False, drop: bool = False) -> Tensor:
        U, T = self.mirrors(p)
        t = t.to(U.dtype)
        return t - ((t @ U) @ (T if back else T.mT)) @ U.mT

    def mirrors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """U, (..., n, r), and T, (..., r, r), with H = I - U T U'."""
        u = p.held("hra_u")
        u = u.float() if u.dtype in NARROW else u
        one = torch.eye(p.hra_r, dtype=u.dtype, device=u.device)
        if p.hra_apply_GS:
            return torch.linalg.qr(u)[0], 2 * one
        U = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)
        G = U.mT @ U
        if exported():
            return U, _columns(G, one)
        # of a product of mirrors: T^-1 is the part of U'U above the diagonal, and 1/2 on it
        return U, torch.linalg.solve_triangular(G.triu(1) + one / 2, one, upper=True)


def _columns(G: Tensor, one: Tensor) -> Tensor:
    """The same T, mirror by mirror: 2 (e - T g) is the next column, with g what the mirrors so far have of it."""
    T = 2 * one[:, :1].expand(*G.shape[:-1], 1)
    for k in range(1, G.shape[-1]):
        T = torch.cat([T, 2 * (one[:, k : k + 1] - T @ G[..., :k, k : k + 1])], -1)
    return T


class HRALayer(UnscaledLayer):
    """A target under HRA adapters."""

    family = "hra"
    adapter_layer_names = ("hra_u",)
    other_param_names = ("hra_r", "hra_apply_GS")
    _parameter_homes = frozenset({"hra_u"})


class HRAModel(BaseTuner):
    """HRA adapters on a model."""

    prefix = "hra_"
    layer_classes = name_layers(HRALayer, globals(), "HRA")
    method: ClassVar[HRA] = HRA()
