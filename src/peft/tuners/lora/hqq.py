"""LoRA's layers over weights of HQQ."""

from __future__ import annotations

from ... import lazy

_NAMES = {"peft.methods.lora.layer": "HqqLoraLinear"}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
