"""LoRA's layers over weights of AWQ."""

from __future__ import annotations

from ... import lazy

_NAMES = {"peft.methods.lora.layer": "AwqLoraLinear"}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
