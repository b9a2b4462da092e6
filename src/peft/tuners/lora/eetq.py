"""LoRA's layers over weights of EETQ."""

from __future__ import annotations

from ... import lazy

_NAMES = {"peft.methods.lora.layer": "EetqLoraLinear"}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
