"""LoftQ under the path that other libraries import."""

from ..methods.lora.loftq import replace_lora_weights_loftq

__all__ = ["replace_lora_weights_loftq"]
