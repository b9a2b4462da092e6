"""Exact algebra of adapters: sums of updates, their truncation, and their conversion to LoRA."""

from .combine import TYPES, Recipe
from .weighted import Report, add_weighted_adapter

__all__ = ["TYPES", "Recipe", "Report", "add_weighted_adapter"]
