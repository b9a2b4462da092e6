"""What variants of LoRA do over the whole model: terms for the loss, and looking at a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ...core.layer import tuner_layers
from . import kasa, monteclora


class Whole:
    """The whole model's part of its LoRA adapters.

    Arguments:
        tuner: the tuner with the adapters; it may hold adapters of other methods too.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def completed(self, output: Any) -> Any:
        """The model's output; the terms below are added by whoever trains."""
        return output

    def _get_kasa_loss(self, adapter_names: Sequence[str] | None = None) -> Tensor | float:
        """KaSA's term for the loss, of these adapters (None: the active ones)."""
        return kasa.loss(self._adapters("takes_out", adapter_names))

    def _get_monteclora_loss(self, adapter_names: Sequence[str] | None = None) -> Tensor | float:
        """MonteCLoRA's term for the loss, of these adapters (None: the active ones); 0 outside training."""
        return monteclora.loss(self._adapters("lora_monteclora_sampler", adapter_names))

    def _adapters(self, mark: str, names: Sequence[str] | None) -> Iterator[Any]:
        chosen = self.tuner.active_adapters if names is None else names
        for _, layer in tuner_layers(self.tuner.model):
            for name, p in getattr(layer, "adapters", {}).items():
                if name in chosen and (mark in p.__dict__ or p.has(mark)):
                    yield p
