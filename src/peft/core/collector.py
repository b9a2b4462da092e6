"""The garbage collector, kept from looking at what is known to be no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 10_000  # new objects that it does not look at one by one


@contextmanager
def no_collection() -> Iterator[None]:
    """Injection makes many small objects and no garbage; the cyclic collector would walk them again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            if gc.get_count()[0] > MANY and not gc.get_freeze_count():
                gc.freeze()  # and so into the oldest generation, of which they are, without a look at each
                gc.unfreeze()
            gc.enable()
