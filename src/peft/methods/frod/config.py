"""The configuration of FRoD."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ...config import describe
from ...errors import PeftWarning
from ...target_config import number, probability
from ..additive import AdditiveConfig


@dataclass
class FrodConfig(AdditiveConfig):
    """The configuration of FRoD."""

    kind = "FROD"
    added = frozenset({"exclude_modules"})
    ranks = ()
    projection_prng_key: int = field(default=0, metadata=describe("Seed of S's places."))
    save_projection: bool = field(default=True, metadata=describe("Keep V and S's places in files."))
    frod_dropout: float = field(default=0.0, metadata=describe("Dropout on the input of the update, in [0, 1)."))
    fan_in_fan_out: bool = field(default=False, metadata=describe("The weight is stored as (in, out)."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))
    sparse_rate: float = field(default=0.01, metadata=describe("Share of S's places that are learnt, in [0, 1]."))
    regularization_alpha: float = field(default=0.001, metadata=describe("a, above 0."))
    progressbar: bool = field(default=True, metadata=describe("Show the decomposition's progress on a terminal."))
    runtime_offload_base_weight: bool = field(
        default=False, metadata=describe("Kept for files: the base weight is needed, and stays.")
    )

    def check(self) -> None:
        """Numbers, and a word about what has no effect."""
        probability("frod_dropout", self.frod_dropout)
        for name in ("sparse_rate", "regularization_alpha"):
            number(name, getattr(self, name))
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"sparse_rate={self.sparse_rate} must lie in [0, 1]: it is a share of all places.")
        if self.regularization_alpha <= 0:
            raise ValueError(f"regularization_alpha={self.regularization_alpha} must be above 0, such as 0.001.")
        for pattern, values in (self.module_config or {}).items():
            if wrong := sorted(set(values) - {"frod_dropout", "init_weights"}):
                raise ValueError(f"module_config[{pattern!r}] sets {wrong[0]}, but layers share what it decides.")
        if self.runtime_offload_base_weight:
            text = "runtime_offload_base_weight has no effect: the update is computed beside the base weight."
            warnings.warn(text, PeftWarning, stacklevel=4)
