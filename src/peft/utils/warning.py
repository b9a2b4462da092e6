"""The library's warnings."""

from ..errors import PeftWarning

__all__ = ["PeftWarning"]
