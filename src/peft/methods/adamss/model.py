"""AdaMSS's layers and tuner."""

from __future__ import annotations

from typing import ClassVar

from ...core.layer import BaseTunerLayer, name_layers
from ..additive import AdditiveModel
from .asa import Subspaces
from .method import AdaMSS


class AdamssLayer(BaseTunerLayer):
    """A target under AdaMSS adapters."""

    family = "adamss"
    adapter_layer_names = ("adamss_A", "adamss_B")
    other_param_names = ("num_subspaces", "adamss_newB")
    _home_order = ("adamss_A", "adamss_B")


NAMES = name_layers(AdamssLayer, globals())


class AdamssModel(AdditiveModel):
    """AdaMSS adapters on a model."""

    prefix = "adamss_"
    layer_classes = NAMES
    method: ClassVar[AdaMSS] = AdaMSS()
    companion = Subspaces
