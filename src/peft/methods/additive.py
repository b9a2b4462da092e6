"""What the additive methods share: DoRA's magnitude over their update, where the configuration asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..config import describe
from ..core.method import Delta
from ..core.tuner import BaseTuner
from ..target_config import TargetConfig
from .dora import DoRA


@dataclass
class AdditiveConfig(TargetConfig):
    """The fields of a method that adds to the weight."""

    added = frozenset({"use_dora"})
    use_dora: bool = field(
        default=False, metadata=describe("Learn the magnitude of each row of the weight beside the update (DoRA).")
    )


class AdditiveModel(BaseTuner):
    """Adapters that add to the weight."""

    @classmethod
    def method_of(cls, settings: Any) -> Any:
        """The method, under DoRA if `use_dora`."""
        method = cls.plain_method_of(settings)
        return under_dora(method) if settings.use_dora else method

    @classmethod
    def plain_method_of(cls, settings: Any) -> Any:
        """The method without DoRA, where it is not the same for every target."""
        return cls.method


@cache
def under_dora(method: Delta) -> DoRA:
    """DoRA's magnitude and direction around a method; one object for each.

    Raises ValueError if the method does not add to the weight.
    """
    if not isinstance(method, Delta) or not method.additive:
        raise ValueError(
            f"use_dora=True: DoRA works over updates that are added to the weight, and {type(method).__name__}'s is "
            "not. Set use_dora=False."
        )
    return DoRA(method)
