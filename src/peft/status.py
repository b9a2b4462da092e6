"""What state a model's adapters are in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .core import storage
from .core.layer import BaseTunerLayer, tuner_layers
from .core.onload import modules_of
from .core.shared import SharedTensors
from .core.tokens import TrainableTokensWrapper
from .types import plain

IRREGULAR: Literal["irregular"] = "irregular"


@dataclass
class TunerLayerStatus:
    """The state of one adapted layer; dictionaries are keyed by adapter name."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The state of a model; "irregular" where its layers disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Literal["irregular"] | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapted layer, in the order of the modules.

    Arguments:
        model: a PeftModel (names are then relative to its tuner), or any model with injected layers.

    Raises TypeError for methods without layers of their own, ValueError if there is no adapted layer.
    """
    root = _root(model)
    layers = [(p, m) for p, m in tuner_layers(root) if not isinstance(m, (SharedTensors, TrainableTokensWrapper))]
    if not layers:
        raise ValueError(f"No adapter layers found in {type(model).__name__}. Expected a model with adapters.")
    return [_layer_status(path, layer) for path, layer in layers]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a model with adapters, summed up over its layers.

    Arguments:
        model: a PeftModel, or any model with injected layers.
    """
    layers = get_layer_status(model)
    trainable, total = count_parameters(model)
    tuned = _tuner(model) is not None
    names = sorted({n for layer in layers for n in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=_base_type(model),
        adapter_model_type=type(_tuner(model)).__name__ if tuned else "None",
        peft_types={n: plain(c.peft_type) for n, c in _configs(model).items()} if tuned else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers),
        active_adapters=_active(layers),
        merged_adapters=_merged(layers),
        requires_grad={n: _same(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
        quantization_backend=_same(layer.quantization_backend for layer in layers),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trainable and of all parameters; shared ones count once, sharded and packed ones in
    full.
    """
    found: dict[Any, tuple[bool, int]] = {}
    for module in modules_of(model):
        if module._parameters or storage.by_class(type(module)) is not None:
            for key, grad, n in storage.counts(module):
                found[key] = grad, n
    return sum(n for grad, n in found.values() if grad), sum(n for _, n in found.values())


def _layer_status(path: str, layer: Any) -> TunerLayerStatus:
    names = sorted(layer._get_available_adapters())
    tensors = {n: [(s.owner, s.attr) for s in layer.slots(n)] for n in names}
    parameters = {n: [o._parameters[a] for o, a in found if a in o._parameters] for n, found in tensors.items()}
    for n, p in getattr(layer, "adapters", {}).items():
        shared = (home._parameters.get(n) for home in getattr(p, "shared", {}).values())
        parameters[n] += [t for t in shared if t is not None]
    return TunerLayerStatus(
        name=path,
        module_type=layer._get_name(),
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={n: _same(p.requires_grad for p in found) for n, found in parameters.items() if found},
        available_adapters=names,
        devices={n: sorted({p.device.type for p in found}) for n, found in parameters.items()},
        quantization_backend=_backend(layer),
    )


def _backend(layer: Any) -> str | None:
    kind = layer.packed if isinstance(layer, BaseTunerLayer) else None
    return kind.label if kind is not None else None


def _same(values: Iterable[Any]) -> Any:
    """The common value, or "irregular"."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else IRREGULAR


def _active(layers: list[TunerLayerStatus]) -> list[str] | Literal["irregular"]:
    """The active adapters, if each layer has all of them that it knows."""
    names = max((s.active_adapters for s in layers), key=len)
    agree = all([n for n in names if n in s.available_adapters] == _known(s) for s in layers)
    return list(names) if agree else IRREGULAR


def _known(layer: TunerLayerStatus) -> list[str]:
    return [n for n in layer.active_adapters if n in layer.available_adapters]


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Literal["irregular"]:
    merged = list(dict.fromkeys(n for s in layers for n in s.merged_adapters))
    loose = {n for s in layers for n in s.available_adapters if n not in s.merged_adapters}
    return IRREGULAR if loose & set(merged) else merged


def _configs(model: nn.Module) -> dict[str, Any]:
    found: Any = getattr(model, "peft_config", None)
    return found if isinstance(found, dict) else {}


def _tuner(model: nn.Module) -> nn.Module | None:
    """The tuner of a PeftModel; None for a bare model with injected layers."""
    tuner = model._modules.get("base_model")
    return tuner if tuner is not None and hasattr(tuner, "inject_adapter") else None


def _root(model: nn.Module) -> nn.Module:
    prompts = [c for c in _configs(model).values() if c.is_prompt_learning or c.is_adaption_prompt]
    if prompts and len(prompts) == len(_configs(model)):
        raise TypeError(f"{plain(prompts[0].peft_type)} has no adapter layers, so there is no status of layers.")
    tuner = _tuner(model)
    return model if tuner is None else tuner


def _base_type(model: nn.Module) -> str:
    if _tuner(model) is not None:
        return type(model.get_base_model()).__name__  # type: ignore[operator]
    known = any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(model).__mro__
    )
    return type(model).__name__ if known else "other"
