"""The layer of LoHa under the path that other libraries import; the method comes with a later release."""

from __future__ import annotations

from ... import lazy

__getattr__, __dir__, __all__ = lazy.names(__name__, {"peft.tuners.loha.layer": "LoHaLayer"})
