"""Ctrl-C between steps that cannot be taken back, not within them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def uncut() -> Iterator[Callable[[], None]]:
    """Note a first Ctrl-C; what is yielded lets it through, and is called where a step ends. A second one breaks in.

    Nothing is noted where Python does not turn it into an error: in other threads, or if it is ignored.
    """
    usual: Any = signal.getsignal(signal.SIGINT)
    received: list[FrameType | None] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(frame)
        if len(received) > 1:
            usual(number, frame)

    def let_through() -> None:
        if received:
            usual(signal.SIGINT, received.pop())

    try:
        held = callable(usual) and bool(signal.signal(signal.SIGINT, note))
    except ValueError:  # signals belong to the main thread
        held = False
    try:
        yield let_through
    finally:
        if held:
            signal.signal(signal.SIGINT, usual)
    let_through()
