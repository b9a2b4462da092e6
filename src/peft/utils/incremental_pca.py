"""Principal components of data that comes in batches, under the path that other libraries import."""

from ..methods.lora.pca import IncrementalPCA

__all__ = ["IncrementalPCA"]
