"""The nested configurations of LoRA. Each is given as an instance, as a dictionary, or not at all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ...config import describe
from ...errors import UnknownFieldWarning, nearest, report


@dataclass
class LoraRuntimeConfig:
    """What holds for this run only; it is not saved."""

    ephemeral_gpu_offload: bool = field(
        default=False,
        metadata=describe("Has no effect here, and warns so: no step is costly enough to be moved."),
    )


@dataclass
class LoftQConfig:
    """LoftQ: factors that make up for the error of a quantised base (Li et al. 2023, arXiv 2310.08659)."""

    loftq_bits: int = field(default=4, metadata=describe("Bits of the quantisation: 4 or 8."))
    loftq_iter: int = field(default=1, metadata=describe("How often quantisation and factors alternate."))

    def __post_init__(self) -> None:
        _choice("loftq_bits", self.loftq_bits, (4, 8))
        _positive("loftq_iter", self.loftq_iter)


@dataclass
class EvaConfig:
    """EVA: A from the principal components of the layer's inputs (Paischer et al. 2024, arXiv 2410.07170)."""

    rho: float = field(default=2.0, metadata=describe("Ranks may grow up to rho * r, at least 1."))
    tau: float = field(default=0.99, metadata=describe("Cosine from which on a component has converged, in [0, 1]."))
    use_label_mask: bool = field(default=True, metadata=describe("Count only the tokens that have a label."))
    label_mask_value: int = field(default=-100, metadata=describe("The label of a token that does not count."))
    whiten: bool = field(default=False, metadata=describe("Divide components by the root of their singular value."))
    adjust_scaling_factors: bool = field(
        default=True, metadata=describe("Change alpha with the rank, so that the scaling stays.")
    )

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError(f"`rho` must be >= 1.0, got {self.rho}.")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"`tau` must be between 0.0 and 1.0, got {self.tau}.")


@dataclass
class CordaConfig:
    """CorDA: factors oriented by the covariance of the inputs (Yang et al. 2024, arXiv 2406.05223)."""

    cache_file: str | None = field(default=None, metadata=describe("File for the decompositions, read if it exists."))
    covariance_file: str | None = field(default=None, metadata=describe("File for the covariances, read if it exists."))
    corda_method: Literal["ipm", "kpm"] = field(
        default="ipm",
        metadata=describe("'ipm' adapts the main directions; 'kpm' keeps them and adapts the least."),
    )
    verbose: bool = field(default=False, metadata=describe("Report progress."))
    use_float16_for_covariance: bool = field(default=False, metadata=describe("Sum covariances in half precision."))
    prune_temporary_fields: bool = field(
        default=True, metadata=describe("Delete what preprocessing stored on the modules, once it is used.")
    )

    def __post_init__(self) -> None:
        _choice("corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """LoRA-GA: factors from the gradient of the full weight (Wang et al. 2024, arXiv 2407.05000)."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = field(
        default="ArB2r", metadata=describe("Which of the first 2r singular vectors A and B get.")
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = field(
        default="stable", metadata=describe("How the factors are scaled.")
    )
    stable_gamma: int = field(default=16, metadata=describe("Divisor (under a root) of the scale 'stable'."))

    def __post_init__(self) -> None:
        _choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        _positive("stable_gamma", self.stable_gamma)


@dataclass
class VeloraConfig:
    """VeLoRA: the inputs kept for the gradient of A are compressed (Miles et al. 2024, arXiv 2405.17991)."""

    num_groups: int = field(default=64, metadata=describe("Groups into which an input is cut."))
    scale: float = field(default=1.0, metadata=describe("Factor on the reconstructed input."))
    init_type: Literal["batch_average", "batch_average_once", "random"] = field(
        default="batch_average", metadata=describe("Where the projection comes from.")
    )

    def __post_init__(self) -> None:
        _positive("num_groups", self.num_groups)
        _positive("scale", self.scale)
        _choice("init_type", self.init_type, ("batch_average", "batch_average_once", "random"))


@dataclass
class MontecloraConfig:
    """MonteCLoRA: A is a mixture of random samples around it, averaged."""

    num_samples: int = field(default=8, metadata=describe("Samples of the mixture."))
    use_entropy: bool = field(default=False, metadata=describe("Add the entropy of the mixture to the loss."))
    dirichlet_prior: float = field(default=0.1, metadata=describe("Concentration of the prior of the mixture."))
    sample_scaler: float = field(default=1e-4, metadata=describe("Size of the samples."))
    kl_loss_weight: float = field(default=1e-5, metadata=describe("Weight of the divergence from the prior."))
    buffer_size: int = field(default=150, metadata=describe("Random samples that are drawn at once."))

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            _positive(name, getattr(self, name))


@dataclass
class BdLoraConfig:
    """BD-LoRA: one factor is block diagonal, so that the adapter can be sharded without communication."""

    target_modules_bd_a: list[str] | None = field(default=None, metadata=describe("Modules with a block diagonal A."))
    target_modules_bd_b: list[str] | None = field(default=None, metadata=describe("Modules with a block diagonal B."))
    nblocks: int = field(default=1, metadata=describe("Number of blocks."))
    match_strict: bool = field(default=True, metadata=describe("Every adapted module must be in one of the lists."))

    def __post_init__(self) -> None:
        _positive("nblocks", self.nblocks)


@dataclass
class ArrowConfig:
    """Arrow: each token goes to the best of several adapters (Ostapenko et al. 2024, arXiv 2405.11157)."""

    top_k: int = field(default=3, metadata=describe("Adapters per token."))
    router_temperature: float = field(default=1.0, metadata=describe("Temperature of the routing softmax."))
    use_gks: bool = field(default=False, metadata=describe("Subtract the general adapters' mean from each adapter."))
    task_adapter_names: list[str] | None = field(
        default=None, init=False, metadata=describe("The adapters routed to; set when the model is made.")
    )
    gks_adapter_names: list[str] | None = field(
        default=None, init=False, metadata=describe("The general adapters; set when the model is made.")
    )
    rng_seed: int | None = field(default=None, metadata=describe("Seed of the decomposition."))

    def __post_init__(self) -> None:
        _positive("top_k", self.top_k)
        _positive("router_temperature", self.router_temperature)


@dataclass
class KasaConfig:
    """KaSA: factors as a singular value decomposition, the base without its noise (arXiv 2412.06071)."""

    beta: float = field(default=1e-4, metadata=describe("Weight of the singular values' norm in the loss."))
    gamma: float = field(default=1e-3, metadata=describe("Weight of orthogonality in the loss."))

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")


def as_option(kind: type, name: str, value: Any) -> Any:
    """An instance of `kind` from an instance, a dictionary or None (which stays None).

    Raises TypeError for anything else. Unknown entries of a dictionary are dropped with an
    `UnknownFieldWarning`.
    """
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise TypeError(f"`{name}` must be a `{kind.__name__}`, a dict, or None; got {value!r}.")
    fields = {f.name: f.init for f in dataclasses.fields(kind)}
    unknown = [k for k in value if k not in fields]
    if unknown:
        hints = "; ".join(f"{k!r}{nearest(k, fields)}" for k in unknown)
        report(UnknownFieldWarning, f"`{name}` has fields that {kind.__name__} does not know: {hints}. Ignored.")
    option = kind(**{k: v for k, v in value.items() if fields.get(k)})
    for k, v in value.items():
        if fields.get(k) is False:
            setattr(option, k, v)
    return option


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"Unsupported `{name}` {value!r}.{hint} Use one of {', '.join(map(repr, choices))}.")


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"`{name}` must be greater than 0, got {value}.")
