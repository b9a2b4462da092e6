"""The names of methods and tasks."""

from ..registry import register_peft_method
from ..types import PeftType, TaskType

__all__ = ["PeftType", "TaskType", "register_peft_method"]
