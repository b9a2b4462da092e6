"""Triton where it is installed; where it is not, or is broken, these modules import all the same and launch nothing."""

from __future__ import annotations

from typing import Any

try:
    import triton as _triton
    import triton.language as _language

    found = True
except Exception:  # a broken installation raises anything
    found = False

tl: Any = _language if found else None


def jit(function: Any) -> Any:
    """A device function."""
    return _triton.jit(function) if found else function
