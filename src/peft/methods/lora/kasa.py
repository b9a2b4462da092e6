"""KaSA: factors as a singular value decomposition, on a weight without its least directions.

    W' = W - U_r S_r V_r' + s B diag(d) A

U_r S_r V_r' are the r smallest singular triplets of W, which the paper takes for noise and the update stands in for.
The base stays as it is: they are held aside. d (r) is trained and starts normal, B at zero. A term for the loss keeps A
and B near orthogonal and d small (`_get_kasa_loss`). Source: Wang et al. 2024, arXiv 2412.06071, eq. 5-9.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.homes import derived_again
from ...core.kept import lasting
from ...core.method import Site
from ...core.stack import Adapter, Stack
from ...core.terms import Term, summed
from .init import DERIVED
from .method import LoRA, hooked
from .room import own, wide


class KaSA(LoRA):
    """W' = W - P Q + s B diag(d) A, with P Q the least directions of W."""

    direct = False  # dropout is not for all of it
    neutral_zeros = False  # the least directions are out of W whatever A and B are

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        small = min(site.view.shape(site.module)[-2:])
        if c.r >= small:
            raise ValueError(
                f"kasa_config takes the r={c.r} least directions out of {site.path!r}, which has only {small}. Lower "
                "r, or give this layer its own rank with rank_pattern."
            )
        shape = (*site.view.shape(site.module)[:-2], c.r)
        built = super().build(site)
        return {**built, "lora_diag": nn.Parameter(torch.empty(shape, **site.kwargs)), "takes_out": True}

    def init(self, p: Adapter, inner: Stack) -> None:
        super().init(p, inner)
        p.lora_diag.normal_()

    def derive(self, p: Adapter, inner: Stack) -> None:
        U, S, Vh = torch.linalg.svd(p.original_weight().detach().float(), full_matrices=False)
        r, dtype = p.r, p.lora_diag.dtype
        pair = wide(Vh[..., -r:, :].to(dtype), (U[..., -r:] * S[..., None, -r:]).to(dtype), p.lora_diag.shape[-1])
        for key, value in zip(DERIVED, pair, strict=True):
            p.layer.keep(p, key, value.contiguous())

    follow_base = derived_again

    def prepare(self, p: Adapter) -> None:
        p.hot = None

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        A, B = self.own_factors(p)
        Q, P = self.first_factors(p)
        up = B * (p.held("lora_diag") * p.scaling)[..., None, :]
        return torch.cat([A, Q], -2), torch.cat([up, -P], -1)

    def terms(self, p: Adapter) -> tuple[Term, ...]:
        """What is added, and what is taken out; in evaluation both together, which is kept."""
        if lasting(p):
            return ((*self.together(p), 1.0),)
        (A, B), (Q, P) = self.own_factors(p), self.first_factors(p)
        return (A, B, p.held("lora_diag") * p.scaling), (Q, P, -1.0)

    def scaling(self, p: Adapter) -> Any:
        return 1.0

    def forward(self, p: Adapter, inner: Stack, x: Tensor) -> Tensor:
        more = not inner.view.dense or self.drop_rate(p) or p.lora_bias
        more = more or hooked(p) or not p.layer.cast_input_dtype_enabled
        found = None if more or type(self).onto is not KaSA.onto else summed(inner, x, self.terms(p))
        return self.onto(p, inner, inner(x), x) if found is None else found

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        """The update of the dropped input, but W without its least directions of the whole one."""
        rate = self.drop_rate(p)
        if not rate and inner.view.groups(inner.base) == 1:
            return super(LoRA, self).onto(p, inner, y, x)
        (A, B), (Q, P) = self.own_factors(p), self.first_factors(p)
        update = inner.low_rank(x, A, B * (p.held("lora_diag") * p.scaling)[..., None, :], rate)
        return (y + update - inner.linear(x, P @ Q)).to(y.dtype)


def loss(adapters: Iterable[Any]) -> Tensor | float:
    """beta |d|^2 + gamma (|B'B - I| + |A A' - I|), summed over adapters."""
    total: Tensor | float = 0.0
    for p in adapters:
        options = p.settings.kasa_config
        A, B = own(p, *getattr(p.method, "of", p.method).own_factors(p))  # that inside, under DoRA
        eye = torch.eye(p.r, dtype=A.dtype, device=A.device)
        apart = torch.linalg.matrix_norm(B.mT @ B - eye) + torch.linalg.matrix_norm(A @ A.mT - eye)
        total = total + options.beta * p.lora_diag.square().sum() + options.gamma * apart.sum()
    return total
