"""Conversion to LoRA under the path that other libraries import."""

from ...algebra.conversion import convert_to_lora, save_as_lora
from ...methods.lora.config import LoraConfig

__all__ = ["LoraConfig", "convert_to_lora", "save_as_lora"]
