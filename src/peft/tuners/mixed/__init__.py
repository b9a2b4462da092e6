"""Several methods in one model, under the path that other libraries import."""

from .model import MixedModel

__all__ = ["MixedModel"]
