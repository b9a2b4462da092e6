"""The tuner of LoRA."""

from ...methods.lora.config import LoraConfig
from ...methods.lora.model import LoraModel

__all__ = ["LoraConfig", "LoraModel"]
