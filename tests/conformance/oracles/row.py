"""What a row of the conformance tests states: a configuration, and the formulas written out once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.layer import BaseTunerLayer

from ..layouts import Layout


@dataclass(frozen=True)
class Row:
    """One method, or one setting of it.

    Arguments:
        config: the class of its configuration.
        fields: what it is made with, beside the layout's targets.
        weight: (layer, adapter's name, W, original W) -> W', all in the stored layout and in double precision.
        bias: (layer, adapter's name, b or None) -> b', or None where the method leaves biases alone.
        forbidden: the words of the error on a layout where the method cannot be; None elsewhere.
        identity: whether a new adapter changes nothing.
        grouped: whether it can be merged into a convolution with groups.
        few: whether it takes part in the tests of state, which do not depend on first values.
        prefix: what the names of its tensors start with.
        noise: how far "training" moves its tensors.
        alone: whether only one adapter can be active.
        own_dtype: whether its tensors are of the base weight's dtype, also of half precision.
        merges: whether there is one W', into which it can be merged.
        of_numbers: whether its tensors' shapes depend on the base's numbers, so that the meta device has none.
        tasks: the task of each sample, where the method must be told.
        of_task: a task -> the `weight` of its samples.
        of_input: the whole batch -> the `weight` of its samples, where they are run together.
        values: (layer, adapter's name) -> the module's tensors by name, where it is replaced as a whole.
    """

    config: type
    fields: dict[str, Any]
    weight: Callable[[BaseTunerLayer, str, Tensor, Tensor], Tensor]
    bias: Callable[[BaseTunerLayer, str, Tensor | None], Tensor | None] | None = None
    forbidden: Callable[[Layout], str | None] = lambda layout: None
    identity: bool = True
    grouped: bool = True
    few: bool = True
    prefix: str = "lora_"
    noise: float = 1 / 3
    alone: bool = False
    own_dtype: bool = False
    merges: bool = True
    of_numbers: bool = False
    tasks: tuple[int, ...] = ()
    of_task: Callable[[int], Callable[[BaseTunerLayer, str, Tensor, Tensor], Tensor]] | None = None
    of_input: Callable[[Tensor], Callable[[BaseTunerLayer, str, Tensor, Tensor], Tensor]] | None = None
    values: Callable[[BaseTunerLayer, str], dict[str, Tensor]] | None = None
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the first word of a layout's name


def held(layer: BaseTunerLayer, name: str) -> dict[str, Tensor]:
    """The adapter's tensors by their names in files, in double precision."""
    return {slot.key: slot.tensor.double() for slot in layer.slots(name)}


def by_input(layer: BaseTunerLayer) -> bool:
    """Whether the weight is stored as (in, out)."""
    base: Any = layer.get_base_layer()
    if layer.parameter_name is not None:
        return bool(getattr(base, "is_transposed", False)) and getattr(base, layer.parameter_name).dim() == 3
    return isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D"


def on_matrix(formula: Callable[[dict[str, Tensor], Tensor, BaseTunerLayer], Tensor]) -> Any:
    """Lift a formula (tensors, W as (..., out, in), layer) -> W' to weights as they are stored."""

    def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
        flat = W.mT if by_input(layer) else W
        conv = isinstance(layer.get_base_layer(), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        flat = flat.flatten(1) if conv else flat
        found = formula(held(layer, name), flat, layer)
        assert found.shape == flat.shape
        return found.reshape(W.shape) if conv else found.mT if by_input(layer) else found

    return weight


def adding(formula: Callable[[dict[str, Tensor], Tensor, BaseTunerLayer], Tensor]) -> Any:
    """Lift a formula (tensors, original W as (..., out, in), layer) -> update to weights as they are stored."""

    def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
        update = formula(held(layer, name), matrix(layer, original), layer)
        return W + (update.mT if by_input(layer) else update.reshape(W.shape))

    return weight


def matrix(layer: BaseTunerLayer, W: Tensor) -> Tensor:
    """A stored weight as (..., out, in)."""
    conv = isinstance(layer.get_base_layer(), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return W.flatten(1) if conv else W.mT if by_input(layer) else W


def directed(layer: BaseTunerLayer, name: str, V: Tensor, of_norm: Tensor) -> Tensor:
    """m V / |V|, a row per out-feature; |V|, taken of `of_norm`, is a constant of the gradient."""
    m = layer.lora_magnitude_vector[name].weight.double()
    if isinstance(layer.get_base_layer(), (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        size = of_norm.detach().flatten(1).norm(dim=1)
        return V * (m.flatten() / size).view(-1, *[1] * (V.dim() - 1))
    V, of_norm = (V.mT, of_norm.mT) if by_input(layer) else (V, of_norm)
    V = V * (m / of_norm.detach().norm(dim=-1)).unsqueeze(-1)
    return V.mT if by_input(layer) else V


def under_dora(row: Row) -> Row:
    """The row of the method under DoRA: its V is the method's own W' of the original weight."""

    def weight(layer: BaseTunerLayer, name: str, W: Tensor, original: Tensor) -> Tensor:
        V = row.weight(layer, name, original, original)
        return directed(layer, name, W + V - original, V)

    return replace(row, fields={**row.fields, "use_dora": True}, weight=weight, few=False)


def eye(n: int, like: Tensor) -> Tensor:
    """The identity matrix of size n."""
    return torch.eye(n, dtype=like.dtype)


def value(layer: BaseTunerLayer, kind: str, key: str) -> Any:
    """A plain value of the first adapter of a method, by the method's class name."""
    methods = {n: type(getattr(p.method, "of", p.method)).__name__ for n, p in layer.adapters.items()}
    return next(layer.adapters[n].__dict__[key] for n, found in methods.items() if found == kind)
