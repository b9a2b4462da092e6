"""LoRA's layers over weights of Intel Neural Compressor."""

from __future__ import annotations

from ... import lazy

_NAMES = {"peft.methods.lora.layer": "IncLoraLinear"}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
