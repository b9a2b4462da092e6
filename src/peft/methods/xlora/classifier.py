"""The gate: it reads the last hidden states of the model and scales each expert for each token, in each layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.buffers import tensors_below
from ...core.shared import SharedTensors
from ...core.stack import Slot


class XLoraClassifier(SharedTensors):
    """The gate of the one X-LoRA adapter of a model, trained and saved as that adapter.

    Arguments:
        name: the adapter.
        config: its XLoraConfig.
        layers: how many layers have experts.
        kwargs: dtype and device.
    """

    def __init__(self, name: str, config: Any, layers: int, **kwargs: Any):
        super().__init__()
        self.name, self.config, self.n_layers, self.n_classes = name, config, layers, len(config.adapters)
        out = self.n_classes * (layers if config.layerwise_scalings else 1)
        sizes = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), out]
        made: list[nn.Module] = []
        for k in range(config.xlora_depth):
            made.append(nn.Linear(sizes[k], sizes[k + 1], **kwargs))
            made += [nn.ReLU()] if k + 1 < config.xlora_depth else []
            made += (
                [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p and k + 1 < config.xlora_depth else []
            )
        self.layers = nn.Sequential(*made)
        self.log_scalings: list[Tensor] = []
        self.logged = False
        self.latest: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., tokens, layers, experts) of hidden states (..., tokens, size)."""
        first: Any = self.layers[0]
        logits = self.layers(hidden.to(first.weight.device, first.weight.dtype))
        if self.config.layerwise_scalings:
            logits = logits.unflatten(-1, (self.n_layers, self.n_classes))
        else:
            logits = logits.unsqueeze(-2).expand(*logits.shape[:-1], self.n_layers, self.n_classes)
        found = (logits / self.config.softmax_temperature).softmax(-1) if self.config.enable_softmax else logits
        self.latest = found
        if self.logged:
            self.log_scalings.append(found)
        return found

    def chosen(self, scalings: Tensor) -> Tensor:
        """The scalings of one layer, (..., experts), with only the k largest left, if that is asked for."""
        k = self.config.top_k_lora
        if k is not None and k < self.n_classes:
            value, at = scalings.topk(max(0, k), -1)
            scalings = torch.zeros_like(scalings).scatter(-1, at, value)
        if not self.config.enable_softmax_topk:
            return scalings
        left = scalings != 0
        return scalings.masked_fill(~left, -torch.inf).softmax(-1).masked_fill(~left, 0.0)

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without the scalings of past forwards, which hang on their graphs."""
        return {**self.__dict__, "latest": None, "log_scalings": []}

    # ---- as an adapter's share of the model --------------------------------------------------------------------

    def _get_available_adapters(self) -> set[str]:
        return {self.name} if "layers" in self._modules else set()

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The gate's parameters."""
        return iter(list(self.layers.parameters()) if name in self._get_available_adapters() else ())

    def slots(self, name: str) -> list[Slot]:
        """The gate's tensors."""
        held = tensors_below(self.layers, "layers.") if name in self._get_available_adapters() else ()
        return [Slot(leaf, leaf, owner, attr) for owner, leaf, attr in held]

    def delete_adapter(self, name: str, active: tuple[str, ...] = ()) -> None:
        """Forget the gate."""
        if name == self.name:
            self._modules.pop("layers", None)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)
