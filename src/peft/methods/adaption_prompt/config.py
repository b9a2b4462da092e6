"""The configuration of adaption prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...config import PeftConfig, describe
from ...types import PeftType


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """The configuration of adaption prompts."""

    target_modules: str | None = field(default=None, metadata=describe("Name of the attention modules."))
    adapter_len: int | None = field(default=None, metadata=describe("Tokens of the prompt in each layer."))
    adapter_layers: int | None = field(default=None, metadata=describe("How many layers, counted from the top."))
    modules_to_save: list[str] | None = field(
        default=None, metadata=describe("Modules to train and save as a whole, such as a new head.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAPTION_PROMPT
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1; got {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary; `modules_to_save`, which the original library lacks, only where it is set."""
        values = super().to_dict()
        if values.get("modules_to_save") is None:
            values.pop("modules_to_save", None)
        return values

    @property
    def is_adaption_prompt(self) -> bool:
        return True
