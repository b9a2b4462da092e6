"""The configuration of cartridges."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import PromptLearningConfig, describe
from ...types import PeftType


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """The configuration of cartridges."""

    num_frozen_tokens: int = field(
        default=1, metadata=describe("How many of the first virtual tokens stay as they are, as an attention sink.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CARTRIDGE
        self.check_frozen()

    def check_frozen(self) -> None:
        """Raise ValueError for a number of frozen tokens that cannot be."""
        frozen, all_of_them = self.num_frozen_tokens, self.num_virtual_tokens
        if isinstance(frozen, bool) or not isinstance(frozen, int) or frozen < 0:
            raise ValueError(f"num_frozen_tokens is {frozen!r}. Give the number of frozen tokens, 0 or more.")
        if all_of_them is not None and frozen > all_of_them:
            raise ValueError(
                f"num_frozen_tokens={frozen} is more than num_virtual_tokens={all_of_them}: there are no more."
            )
