"""X-LoRA: `config`, `classifier` (the gate), `layer` (what a layer does with it), `model`."""

from .classifier import XLoraClassifier
from .config import XLoraConfig
from .layer import Gated
from .model import XLoraModel

__all__ = ["Gated", "XLoraClassifier", "XLoraConfig", "XLoraModel"]
