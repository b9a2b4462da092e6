"""What LoHa and LoKr share, under the path that other libraries import."""

from __future__ import annotations

from ..methods.loha import LycorisConfig, LycorisLayer
from ..methods.loha import LycorisModel as LycorisTuner

__all__ = ["LycorisConfig", "LycorisLayer", "LycorisTuner"]
