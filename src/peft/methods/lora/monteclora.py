"""MonteCLoRA: training sees A as a weighted mean of random samples around it, evaluation A itself.

    A_live = sum_i w_i (A + e L_i' ),   E_i = sample_scaler z_i L,  z_i normal (in, r),  L L' = diag(D Z D)

with Z of a Wishart distribution, D = exp(std_prior), and weights w from a Laplace approximation of a Dirichlet
distribution with concentrations exp(expert_weights_prior). The divergences from the priors are a term for the loss
(`_get_monteclora_loss`). Source: Sengupta et al. 2024, arXiv 2411.04358. Samples are drawn when they are
needed, so that `buffer_size` has no effect.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.method import Site
from ...core.stack import Adapter, Stack
from ...errors import PeftWarning
from ...kernels import lowrank
from ...kernels.modes import numbered
from .method import InTraining

LEAST = 1e-3  # of a variance


class Sampler(nn.Module):
    """What the samples are drawn with: trained scales (r) and concentrations (N), and the last weights (N)."""

    weights: Tensor | None = None  # those of the last training forward, with their gradient

    def __init__(self, r: int, samples: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.std_prior = nn.Parameter(torch.empty(r, **kwargs))
        self.expert_weights_prior = nn.Parameter(torch.empty(samples, **kwargs))
        self.gaussian_var_prior = nn.Buffer(torch.eye(r, **kwargs))
        self.expert_weights = nn.Buffer(torch.full((samples,), 1 / samples, **kwargs))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "weights"}

    def variance(self) -> Tensor:
        """The diagonal of a random D Z D, (r,); that of Z is independent, chi-squared with r degrees of freedom."""
        r = len(self.std_prior)
        Z = torch.randn(r, r, dtype=self.std_prior.dtype, device=self.std_prior.device).square().sum(1)
        return (Z * torch.exp(2 * self.std_prior)).clamp_min(LEAST)  # of a Wishart matrix only the diagonal is used

    def mixture(self) -> Tensor:
        """Random weights, (N,)."""
        log_alpha = self.expert_weights_prior
        N, inverse = len(log_alpha), torch.exp(-log_alpha)
        spread = inverse * (1 - 2 / N) + inverse.sum() / N**2
        u = torch.randn_like(log_alpha)
        return torch.softmax((spread + torch.finfo(spread.dtype).eps).sqrt() * u + log_alpha - log_alpha.mean(), 0)

    def _get_name(self) -> str:
        return "MontecloraSampler"


class MonteCLoRA(InTraining):
    """LoRA whose A is sampled while training."""

    def build(self, site: Site) -> dict[str, Any]:
        c = site.settings
        sampler = Sampler(c.r, c.monteclora_config.num_samples, site.dtype, site.device)
        return {**super().build(site), "lora_monteclora_sampler": sampler}

    def init(self, p: Adapter, inner: Stack) -> None:
        super().init(p, inner)
        p.lora_monteclora_sampler.std_prior.uniform_()
        p.lora_monteclora_sampler.expert_weights_prior.uniform_()

    def sampled(self, p: Adapter, A: Tensor) -> Tensor:
        """A as this training forward sees it."""
        sampler, scale = p.held("lora_monteclora_sampler"), p.settings.monteclora_config.sample_scaler
        w = sampler.mixture()
        z = torch.randn(len(w), *A.shape, dtype=A.dtype, device=A.device)
        noise = z * (sampler.variance().sqrt() * scale)[:, None]
        live = A + torch.einsum("n,n...->...", w, noise)
        finite = torch.isfinite(live.detach().sum())
        live = torch.where(finite, live, A)
        if not torch.compiler.is_compiling() and numbered(finite) and not finite:
            warnings.warn(
                f"MonteCLoRA at {p.path!r}: the samples are not finite; A is used.", PeftWarning, stacklevel=2
            )
            return A
        sampler.weights = w
        with torch.no_grad():
            sampler.expert_weights.copy_(w)
        return live

    def live_factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """`factors` with a sampled A; what an initialisation takes out of the base weight is not sampled."""
        A, B = self.own_factors(p)
        return self.with_first(p, self.sampled(p, A), B)

    def live_delta(self, p: Adapter, W: Tensor) -> Tensor:
        if not p.layer.training:
            return self.delta(p, W)
        self.refuse_merge(p)
        A, B = self.live_factors(p)
        return (B @ A) * p.scaling

    def onto(self, p: Adapter, inner: Stack, y: Tensor, x: Tensor) -> Tensor:
        if not p.layer.training:
            return super().onto(p, inner, y, x)
        (A, B), extra = self.live_factors(p), self.up_bias(p)
        if inner.view.dense:
            y = y if extra is None else (y + extra * p.scaling).to(y.dtype)
            return lowrank.add(y, x, A, B, p.scaling, self.drop_rate(p))
        update = inner.low_rank(x, A, B, self.drop_rate(p))
        update = update if extra is None else update + inner.spread(extra)
        return (y + update * p.scaling).to(y.dtype)


def loss(adapters: Iterable[Any]) -> Tensor | float:
    """The mean over layers of kl_loss_weight (divergences from the priors), and the entropy's stand-in if asked."""
    terms = [_term(p) for p in adapters if p.layer.training]
    return sum(terms) / len(terms) if terms else 0.0


def _term(p: Any) -> Any:
    sampler, options = p.lora_monteclora_sampler, p.settings.monteclora_config
    alpha = torch.exp(sampler.expert_weights_prior)
    prior = torch.full_like(alpha, options.dirichlet_prior)
    total, given = alpha.sum(), prior.sum()
    dirichlet = (
        torch.lgamma(total) - torch.lgamma(given) + (torch.lgamma(prior) - torch.lgamma(alpha)).sum()
        + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(total))).sum()
    )  # fmt: skip
    v, r = torch.exp(2 * sampler.std_prior), len(sampler.std_prior)
    wishart = 0.5 * (-r * v.log().sum() + r * v.sum() - r**2)
    variance = sampler.variance()
    normal = len(alpha) / 2 * (variance.sum() - variance.clamp_min(1e-6).log().sum() - r)
    term = options.kl_loss_weight * (dirichlet + wishart + normal)
    w = sampler.weights
    return term + w.square().sum() if options.use_entropy and w is not None else term


class MontecloraTrainerMixin:
    """Adds the divergences to the loss of a Trainer: `class MyTrainer(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The trainer's loss and MonteCLoRA's term for it."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        inner = getattr(model, "module", model)  # below a wrapper for several devices
        term = getattr(getattr(inner, "base_model", None), "_get_monteclora_loss", lambda: 0.0)()
        return (found[0] + term, *found[1:]) if return_outputs else found + term
