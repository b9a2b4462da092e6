"""LoRA's layers over weights of Transformer Engine."""

from __future__ import annotations

from ... import lazy

_NAMES = {"peft.methods.lora.layer": "TeLinear"}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
