"""FRoD's layers and tuner."""

from __future__ import annotations

from typing import ClassVar

from ...core.layer import BaseTunerLayer, name_layers
from ..additive import AdditiveModel
from .method import FRoD

TRAINED = ("frod_lambda_l", "frod_lambda_s_values")


class FrodLayer(BaseTunerLayer):
    """A target under FRoD adapters."""

    family = "frod"
    _sized = True
    adapter_layer_names = TRAINED
    other_param_names = ("frod_dropout",)
    _home_order = ("frod_dropout", *TRAINED)
    _parameter_homes = frozenset(TRAINED)


NAMES = name_layers(FrodLayer, globals())


class FrodModel(AdditiveModel):
    """FRoD adapters on a model."""

    prefix = "frod_"
    layer_classes = NAMES
    method: ClassVar[FRoD] = FRoD()
