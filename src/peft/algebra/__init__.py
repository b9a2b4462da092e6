"""Exact algebra of adapters: sums of updates, their truncation, and their conversion to LoRA."""

from .combine import TYPES, Recipe
from .conversion import Conversion, convert_to_lora, save_as_lora, to_lora
from .weighted import Report, add_weighted_adapter

__all__ = [
    "TYPES",
    "Conversion",
    "Recipe",
    "Report",
    "add_weighted_adapter",
    "convert_to_lora",
    "save_as_lora",
    "to_lora",
]
