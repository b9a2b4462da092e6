"""The layer that replaces rows of an embedding."""

from __future__ import annotations

from ... import lazy

__getattr__, __dir__, __all__ = lazy.names(__name__, {"peft.core.tokens": "TrainableTokensLayer"})
