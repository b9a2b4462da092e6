"""Methods under the paths that other libraries import."""

from __future__ import annotations

from .. import lazy

_NAMES = {
    "peft.methods.lora.config": "EvaConfig LoftQConfig LoraConfig LoraRuntimeConfig",
    "peft.methods.lora.model": "LoraModel",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
