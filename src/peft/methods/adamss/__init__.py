"""AdaMSS: several small subspaces of the weight's principal directions, and a budget of those that stay trainable."""

from .config import AdamssConfig
from .model import AdamssLayer, AdamssModel

__all__ = ["AdamssConfig", "AdamssLayer", "AdamssModel"]
