"""What a method does over the whole model, beside its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Companion:
    """What a method does over the whole model, beside its layers; made with the tuner when the method comes in.

    Arguments:
        tuner: the tuner with the adapters; it may hold adapters of other methods too.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def added(self, name: str, undo: list[Callable[[], Any]]) -> None:
        """An adapter of the method has been placed; `undo` receives what takes back what is done here."""

    def completed(self, output: Any) -> Any:
        """The model's output, with what the method adds to it."""
        return output
