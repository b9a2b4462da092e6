"""AdaLoRA: `config`, `method` (the mathematics), `budget` (which ranks stay), `model`."""

from .budget import RankAllocator
from .config import AdaLoraConfig
from .model import AdaLoraLayer, AdaLoraModel

__all__ = ["AdaLoraConfig", "AdaLoraLayer", "AdaLoraModel", "RankAllocator"]
