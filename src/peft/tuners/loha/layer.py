"""The names of LoHa's tensors: diffusers reads them to leave adapters out when it casts a model's layers."""

from __future__ import annotations

from ... import lazy
from ...core.layer import BaseTunerLayer


class LoHaLayer(BaseTunerLayer):
    """A target under LoHa adapters; no module is one before the release that brings the method."""

    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "module_dropout")


__getattr__, __dir__, _ = lazy.names(__name__, {})
