"""Adaption prompts."""

from .config import AdaptionPromptConfig
from .layer import AdaptedAttention, AdaptedAttentionGPT
from .model import AdaptionPromptModel

__all__ = ["AdaptedAttention", "AdaptedAttentionGPT", "AdaptionPromptConfig", "AdaptionPromptModel"]
