"""The configuration of AdaMSS."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import describe
from ...target_config import choice, number, probability
from ..additive import AdditiveConfig


@dataclass
class AdamssConfig(AdditiveConfig):
    """The configuration of AdaMSS."""

    kind = "ADAMSS"
    added = frozenset({"exclude_modules", "bias"})
    ranks = ("r", "num_subspaces", "subspace_rank", "asa_target_subspaces", "mask_interval")
    r: int = field(default=100, metadata=describe("Principal directions of the weight; at most its sizes."))
    num_subspaces: int = field(default=5, metadata=describe("Clusters of rows, each with a subspace of its own."))
    subspace_rank: int = field(default=1, metadata=describe("Dimensions of each subspace; at most its rows."))
    init_weights: str | bool | None = field(
        default="orthogonal", metadata=describe("Start at the base model ('orthogonal'); None, False: B is random.")
    )
    use_asa: bool = field(
        default=False, metadata=describe("Freeze what matters least (`update_and_allocate(step)` after backward).")
    )
    asa_target_subspaces: int = field(default=50, metadata=describe("Subspaces of the model that stay in the end."))
    init_warmup: int = field(default=50, metadata=describe("The step from which importance is measured."))
    final_warmup: int = field(default=1000, metadata=describe("The step by which the target is reached."))
    mask_interval: int = field(default=100, metadata=describe("Steps between two cuts."))
    asa_importance_beta: float = field(default=0.85, metadata=describe("Memory of the mean importance, in [0, 1)."))
    asa_uncertainty_beta: float = field(default=0.85, metadata=describe("Memory of its spread, in [0, 1)."))
    asa_schedule_exponent: float = field(default=3.0, metadata=describe("How fast the first cuts are."))
    use_dynamic_rank: bool = field(
        default=False, metadata=describe("Each subspace has the rank that its rows have, at most subspace_rank.")
    )
    svd_threshold: float = field(
        default=0.1, metadata=describe("Directions count from this share of the largest singular value on.")
    )
    random_seed: int = field(default=0, metadata=describe("Seed of the decomposition of the weight."))

    def check(self) -> None:
        """Numbers and choices."""
        choice("init_weights", self.init_weights, ("orthogonal", None, False))
        probability("asa_importance_beta", self.asa_importance_beta)
        probability("asa_uncertainty_beta", self.asa_uncertainty_beta)
        number("asa_schedule_exponent", self.asa_schedule_exponent)
        number("svd_threshold", self.svd_threshold)
        if self.use_asa and self.final_warmup <= self.init_warmup:
            raise ValueError(
                f"final_warmup={self.final_warmup} must come after init_warmup={self.init_warmup}: subspaces are "
                "frozen step by step in between."
            )
