"""LoRA's layers over weights of bitsandbytes."""

from __future__ import annotations

from ... import lazy

_NAMES = {"peft.methods.lora.layer": "Linear4bit Linear8bitLt"}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
