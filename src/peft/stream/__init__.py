"""Merging adapters into checkpoints that need not fit into memory: tensor by tensor, from files to files."""

from __future__ import annotations

from .merge import Merged, merge_checkpoint
from .shards import CheckpointError

__all__ = ["CheckpointError", "Merged", "merge_checkpoint"]
