"""The configuration of prefix tuning (Li and Liang 2021, arXiv 2101.00190).

Training libraries ask `isinstance(config, PrefixTuningConfig)` of every adapter, so the class and its files are here;
the method itself comes with a later release, and a model that is asked for it says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..config import PromptLearningConfig, describe
from ..types import PeftType


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Trained keys and values in front of those of every attention layer."""

    init_weights: Literal["zero"] | None = field(
        default=None, metadata=describe("'zero' starts from prefixes of zeros; None from random ones.")
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata=describe("Hidden size of the network that projects the prefix.")
    )
    prefix_projection: bool = field(
        default=False, metadata=describe("Train a small network that makes the prefix, instead of the prefix.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights is {self.init_weights!r}. Use 'zero' or None.")
