"""Looking into adapters: what a folder holds, and whether it fits a base model."""

from .check import Fit, check_adapter
from .inspect import inspect_adapter
from .report import Inspection, Problem, TargetInfo, TensorInfo, UnreadableAdapterError

__all__ = [
    "Fit",
    "Inspection",
    "Problem",
    "TargetInfo",
    "TensorInfo",
    "UnreadableAdapterError",
    "check_adapter",
    "inspect_adapter",
]
