"""The LoRA tuner."""

from __future__ import annotations

from typing import Any

from ...core.method import Method
from ...core.tuner import BaseTuner
from ..dora import DoRA
from .layer import NAMES
from .method import LoRA, OutProjection

_PLAIN, _DORA, _OUT = LoRA(), DoRA(LoRA()), OutProjection()


class LoraModel(BaseTuner):
    """LoRA adapters on a model.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    prefix = "lora_"
    layer_classes = NAMES

    @classmethod
    def method_of(cls, settings: Any) -> Method:
        return _DORA if settings.use_dora else _PLAIN

    @classmethod
    def out_projection_method_of(cls, settings: Any) -> Method:
        return _DORA if settings.use_dora else _OUT
