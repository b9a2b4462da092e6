"""The library's errors."""

from ..errors import NoMatchingPeftModuleError, PeftError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
