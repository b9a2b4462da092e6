"""What a method does over the whole model, beside its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class Companion:
    """What a method does over the whole model, beside its layers; made with the tuner when the method comes in.

    Arguments:
        tuner: the tuner with the adapters; it may hold adapters of other methods too.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def added(self, name: str, undo: list[Callable[[], Any]]) -> None:
        """An adapter of the method has been placed; `undo` receives what takes back what is done here."""

    def spread(self, name: str, own: Any, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A file's tensors as an adapter of the method, which is there already, holds them.

        Arguments:
            name: the adapter.
            own: the configuration beside the file.
            state: key in files -> tensor, which may be on the meta device.
        """
        return state

    def for_file(self, name: str, config: Any) -> Any:
        """An adapter's configuration as files hold it: itself, or a copy with what the adapter's tensors are."""
        return config

    def taken_over(self, name: str, own: Any) -> None:
        """Such a file, with `own` beside it, has been written into the adapter."""

    def schedule(self, name: str) -> int | None:
        """The step at which an adapter's schedule stands; None where there is none to go through."""
        return None

    def completed(self, output: Any) -> Any:
        """The model's output, with what the method adds to it."""
        return output
