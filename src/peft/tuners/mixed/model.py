"""The tuner of a model with several methods, under the path that other libraries import: any tuner can be one."""

from __future__ import annotations

from ...core.tuner import BaseTuner as MixedModel

__all__ = ["MixedModel"]
