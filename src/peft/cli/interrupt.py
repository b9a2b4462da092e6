"""Ctrl-C between steps, not within them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM in a list, so that the step in hand ends; a second one raises."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals belong to the main thread
        old = {}
    try:
        yield received
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
