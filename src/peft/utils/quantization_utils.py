"""Quantised weights under the names of the peer library; `core/storage.py` is what they are read and written by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import storage, views
from ..core.layer import BaseTunerLayer
from ..lazy import announce

announce(__name__)


class QuantizationBackend:
    """How a quantised layer's weight is read and written.

    Attributes:
        backend_name: of the storage, such as "bnb 4bit".
        supports_merge: whether an adapter can be merged into such a weight.
    """

    def __init__(self, kind: storage.Storage, name: str = "weight"):
        self._kind, self._name = kind, name
        self.backend_name = kind.label or ""
        self.supports_merge = isinstance(kind, storage.Packed)

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The numbers of a layer's weight, made anew, without a gradient."""
        with torch.no_grad():
            return self._kind.read(base_layer, self._name).detach()

    def set_base_weight(self, peft_layer: BaseTunerLayer, weight_data: Tensor) -> None:
        """Round numbers into the weight below a tuner layer.

        Arguments:
            peft_layer: the tuner layer.
            weight_data: in the weight's own shape.

        Raises NotImplementedError for a storage that cannot be written.
        """
        self._kind.write(peft_layer.get_base_layer(), self._name, weight_data)

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        """A layer's output as something that may be added to in place: a copy if it is a view or kept for backward."""
        return x.clone() if x.grad_fn is not None or x._is_view() else x


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """How the weight of a layer is quantised; None for a dense one, and for a module without a weight.

    Arguments:
        base_layer: the module itself, not the tuner layer around it.
        kwargs: as `get_quantization_kwargs` gives them; storages here read their settings off the weight.
    """
    name = views.view_of(base_layer).name if hasattr(base_layer, "weight") or _named(base_layer) else ""
    kind = storage.packed(base_layer, name)
    return None if kind is None else QuantizationBackend(kind, name)


def _named(module: nn.Module) -> bool:
    return storage.by_class(type(module)) is not None


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """What the peer needs of a model for `resolve_quantization_backend`: torchao's configuration, if there is one."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    found = getattr(config, "get_apply_tensor_subclass", None)
    return {} if found is None else {"get_apply_tensor_subclass": found}


def quantization_extra_repr(module: nn.Module) -> str:
    """What a tuner layer is printed with: how its base weight is quantised, unless its class's name says so."""
    text = module.extra_repr() if isinstance(module, BaseTunerLayer) else ""
    return text[text.index("quantization_backend") :] if "quantization_backend" in text else ""


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The quantisation's configuration of a model that was quantised by `method` ("gptq" ...), else None."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)
