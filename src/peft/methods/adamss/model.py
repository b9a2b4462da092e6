"""AdaMSS's layers and tuner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ...core.layer import BaseTunerLayer, name_layers
from ..additive import AdditiveModel
from .asa import Subspaces, pair
from .method import AdaMSS


class AdamssLayer(BaseTunerLayer):
    """A target under AdaMSS adapters."""

    family = "adamss"
    adapter_layer_names = ("adamss_A", "adamss_B")
    other_param_names = ("num_subspaces", "adamss_newB")

    def never_trained(self, name: str) -> Sequence[nn.Parameter]:
        """The subspaces that the allocation has frozen."""
        p = self.adapters.get(name)
        return [t for k in p.__dict__.get("frozen", ()) for t in pair(p, k)] if p is not None else ()


NAMES = name_layers(AdamssLayer, globals())


class AdamssModel(AdditiveModel):
    """AdaMSS adapters on a model."""

    prefix = "adamss_"
    layer_classes = NAMES
    method: ClassVar[AdaMSS] = AdaMSS()
    companion = Subspaces
