"""What a merge will make of a model, worked out on its skeleton by the ordinary steps of unloading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core import unload as unloading
from ..core.layer import BaseTunerLayer, tuner_layers
from ..core.tie import places
from .skeleton import held, named_tensors

Work = tuple[BaseTunerLayer, tuple[str, ...]]


@dataclass
class Value:
    """Where the numbers of a tensor of the merged model come from.

    Arguments:
        names: the tensor of the base that they start from, by all its names; none where they are an adapter's own.
        own: the numbers, where an adapter brings them.
        work: layers, and the names of the adapters to merge, in order.
        beside: what else the merge reads: of a weight the bias of its layer; of a bias the weight, if it is needed.
        is_bias: whether it is a bias to the layers of `work`.
    """

    names: list[str]
    own: Tensor | None = None
    work: list[Work] = field(default_factory=list)
    beside: Value | None = None
    is_bias: bool = False

    @property
    def changed(self) -> bool:
        """Whether the numbers differ from the base's."""
        return bool(self.work) or self.own is not None


class Outcome:
    """The merged model's tensors by name: `values`; names that are tied have the very same value.

    Arguments:
        tuner: the tuner on the skeleton; it is taken out.
        base: the skeleton's tensors by name before adapters were put on it.
        names: the adapters, in order.
        equal: tells whether two values are the same numbers.
    """

    def __init__(
        self,
        tuner: Any,
        base: dict[str, tuple[nn.Module, str]],
        names: list[str],
        equal: Callable[[Value, Value], bool],
    ):
        self.known: dict[int, Value] = {}
        self.kept: list[Tensor] = []  # so that no identity is given twice
        self.base, self.equal = base, equal
        tied: dict[int, list[str]] = {}
        for name, place in base.items():
            tied.setdefault(id(held(*place)), []).append(name)
        self.aliases = {name: group for group in tied.values() for name in group}
        unloading.check_merge(tuner.layers(), names)
        found = list(tuner_layers(tuner.model))
        layers = [layer for _, layer in found if isinstance(layer, BaseTunerLayer)]
        work = [(layer, tuple(n for n in names if n in layer.adapters)) for layer in layers]
        work = [(layer, own) for layer, own in work if own]
        for layer, own in work:
            layer.check_merge(own, stay=False)
        together = unloading.tied_to_embedding(tuner.model)
        self._merge(tuner.model, layers, work, names)
        several = places(tuner.model)
        for path, layer in reversed(found):
            unloading.take_out(tuner, path, layer, names, several)
        self.model = tuner.model
        before = {name: held(*place) for name, place in named_tensors(self.model).items()}
        unloading.settle(self.model, together)
        self.values = self._final(before)

    def _merge(self, model: nn.Module, layers: list[BaseTunerLayer], work: list[Work], names: list[str]) -> None:
        groups = unloading.shared(model)
        unloading.untie(layers, names, groups)
        for layer, own in work:
            if not layer.view.name:  # another module takes the place of the whole
                layer._merge(own, keep=False)
        for name, place in self.base.items():
            self._know(held(*place), self.aliases[name])
        for layer, own in work:
            self._note(layer, own)
        unloading.retie(groups, work, self._same)

    def _note(self, layer: BaseTunerLayer, own: tuple[str, ...]) -> None:
        """Note what is merged into the weight of a layer, and into its bias if that changes."""
        base, view = layer.get_base_layer(), layer.view
        weight = self.known.get(id(held(base, view.name))) if view.name else None
        if weight is None:
            return
        weight.work.append((layer, own))
        tensor = held(base, view.bias_name) if view.bias_name else None
        bias = None if tensor is None else self.known.get(id(tensor))
        weight.beside = bias or weight.beside
        if tensor is None or bias is None:
            return
        changes, reads = of_bias(layer, own, tensor)
        if changes:
            bias.work.append((layer, own))
            bias.is_bias = True
            bias.beside = weight if reads else bias.beside

    def _know(self, tensor: Tensor, names: list[str]) -> Value:
        """The value of a tensor; one with numbers has them from an adapter."""
        value = self.known.get(id(tensor))
        if value is None:
            own = None if tensor.device.type == "meta" else tensor
            value = self.known[id(tensor)] = Value(names, own)
            self.kept.append(tensor)
        return value

    def _same(self, other: Any, source: Any) -> bool:
        one, two = self.known.get(id(other)), self.known.get(id(source))
        if one is None or two is None:
            return other.device.type == source.device.type != "meta" and torch.equal(other, source)
        if one.own is two.own and one.work == two.work:
            return True
        return self.equal(one, two)

    def _final(self, before: dict[str, Tensor]) -> dict[str, Value]:
        """Values by name. What `settle` has copied has the numbers of what stood under its name before."""
        values: dict[str, Value] = {}
        for name, (module, attr) in named_tensors(self.model).items():
            tensor, old = held(module, attr), before.get(name)
            value = self.known.get(id(tensor))
            if value is None and old is not None and old is not tensor and id(old) in self.known:
                source = self.known[id(old)]
                value = self.known[id(tensor)] = dataclasses.replace(source)
                self.kept.append(tensor)
            values[name] = self._know(tensor, []) if value is None else value
        return values


@torch.no_grad()
def of_bias(layer: BaseTunerLayer, names: tuple[str, ...], bias: Tensor) -> tuple[bool, bool]:
    """Whether a merge changes a layer's bias, and whether it reads the weight for that."""
    probe = torch.zeros(bias.shape, dtype=bias.dtype, device="cpu")
    try:
        return any(layer.adapters[n].method.bias(layer.adapters[n], probe) is not probe for n in names), False
    except (RuntimeError, NotImplementedError):  # of numbers that are on no device
        return True, True
