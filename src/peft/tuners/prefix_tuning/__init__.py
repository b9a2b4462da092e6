"""The configuration of prefix tuning under the path that other libraries import."""

from __future__ import annotations

from ... import lazy

__getattr__, __dir__, __all__ = lazy.names(__name__, {"peft.methods.prefix_tuning": "PrefixTuningConfig"})
