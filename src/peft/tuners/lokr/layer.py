"""The names of LoKr's tensors: diffusers reads them to leave adapters out when it casts a model's layers."""

from __future__ import annotations

from ... import lazy
from ...core.layer import BaseTunerLayer


class LoKrLayer(BaseTunerLayer):
    """A target under LoKr adapters; no module is one before the release that brings the method."""

    adapter_layer_names = (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
    )
    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "module_dropout")


__getattr__, __dir__, _ = lazy.names(__name__, {})
