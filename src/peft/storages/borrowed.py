"""What a storage borrows from the library that made a weight, fetched when it is needed and not before."""

from __future__ import annotations

import importlib
from typing import Any


def borrow(module: str, name: str) -> Any:
    """A function or class of a library.

    Arguments:
        module: where it lies, such as "bitsandbytes.functional".
        name: what it is called there.

    Raises ImportError naming the library, if it cannot be imported whole or has no such thing.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a broken library raises anything
        library = module.partition(".")[0]
        raise ImportError(
            f"A weight of {library} is read and written with {module}.{name}, which cannot be had from the {library} "
            f"that is installed ({type(error).__name__}: {error}). Install a version that works: pip install -U "
            f"{library}. Layers of other kinds are not concerned."
        ) from error
