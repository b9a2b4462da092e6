"""Looking into adapters: what a folder holds, whether it fits a base model, and whether one learns."""

from .check import Fit, check_adapter
from .diagnosis import Checkup, Finding
from .doctor import Doctor
from .inspect import inspect_adapter
from .report import Inspection, Problem, TargetInfo, TensorInfo, UnreadableAdapterError

__all__ = [
    "Checkup",
    "Doctor",
    "Finding",
    "Fit",
    "Inspection",
    "Problem",
    "TargetInfo",
    "TensorInfo",
    "UnreadableAdapterError",
    "check_adapter",
    "inspect_adapter",
]
