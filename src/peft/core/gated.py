"""Compiled layers that are switched off and rescaled without another graph.

Compiled code guards numbers by value and tensors by shape. While a program is traced a layer therefore runs twins of
its adapters, whose scalings are tensors, and a tensor chooses between its output and the base's. What is chosen is the
output of the base alone, bit for bit, whatever an update amounts to. Nothing of this exists before a layer is traced,
or is looked at by a forward that is not compiled; exported programs hold the adapter alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.modes import exporting, is_autocast
from .cells import reference, references
from .deferred import traced
from .direct import is_conv, is_ordinary
from .stack import Adapter, Finish, InPlace, Stack, stack_of

GRAPH = ("_flag", "_graph")  # what a traced layer holds beyond others; no copy of it does


def frozen() -> bool:
    """Whether tensors become constants of a graph (`TORCHINDUCTOR_FREEZING`), so that none can choose."""
    config = sys.modules.get("torch._inductor.config")
    return bool(getattr(config, "freezing", False)) and not torch.is_grad_enabled()


frozen._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Through(Stack):
    """What stands below an adapter, during one forward: it keeps what the base gives, and lets a tensor choose.

    Arguments:
        below: the stack.
        x: the layer's input.
        flag: whether the adapter is in force, a tensor without dimensions.
    """

    gated = True

    def __init__(self, below: Stack, x: Tensor, flag: Tensor):
        self.layer, self.view, self.adapters, self.extra = below.layer, below.view, below.adapters, below.extra
        self.packed, self.again, self.last, self.inner = below.packed, below.again, below.last, below.inner
        self.below, self.x, self.flag = below, x, flag
        self.given: Tensor | None = None  # by the base
        self.chosen_before = False  # the product was made with what a tensor chose

    def __call__(self, z: Tensor) -> Tensor:
        fits = z is self.x or (z.shape == self.x.shape and z.dtype is self.x.dtype)
        y = self.below(z if z is self.x or not fits else torch.where(self.flag, z, self.x))
        if fits:
            self.given = y
        return y

    def gate(self, changed: Tensor, W: Tensor) -> Tensor:
        self.chosen_before = True
        return torch.where(self.flag, changed, W)

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        base, own = self.base, self.view.bias(self.base)
        alike = (b is None) is (own is None) and W.dtype is x.dtype and not x.is_nested and not is_autocast(x)
        if not alike or self.last is not None or self.packed is not None or not (is_ordinary(base) or is_conv(base)):
            return super().affine(x, W, b)
        W = self.gate(W, self.live_weight())
        b = b if b is None or b is own else torch.where(self.flag, b, own)
        if self.view.dense:
            return F.linear(x, W, b)
        convolve: Any = base._conv_forward
        return convolve(x, self.view.raw(base, W), b)

    def result(self, y: Tensor) -> Tensor | None:
        """The layer's output, if the adapter's is y; None where the base has not been asked."""
        if self.chosen_before or y is self.given:
            return y
        return None if self.given is None else torch.where(self.flag, y, self.given)


class Gated(Stack):
    """A stack of which a tensor of the layer decides whether it runs as the base."""

    def __init__(self, layer: Any, adapters: tuple[Adapter, ...]):
        super().__init__(layer, adapters)
        if adapters[:-1]:
            self.inner = Gated(layer, adapters[:-1])

    def __call__(self, x: Tensor) -> Tensor:
        through = Through(self.inner, x, self.layer._flag)  # type: ignore[arg-type]
        y = self.last.method.forward(self.last, through, x)  # type: ignore[union-attr]
        found = through.result(y)
        if found is None:
            self.layer._without_gate()
            return self.inner(x) if self.layer._off else y  # type: ignore[misc]
        return found

    def live_weight(self) -> Tensor:
        return torch.where(self.layer._flag, super().live_weight(), self.layer.base_weight())

    def bias(self) -> Tensor | None:
        b, own = super().bias(), self.view.bias(self.base)
        if b is None or b is own:
            return b
        return torch.where(self.layer._flag, b, b.new_zeros(()) if own is None else own)


class Twin(Adapter):
    """An adapter as graphs have it."""

    def follow(self, key: str, value: Any) -> None:
        """A plain value of the adapter has been set."""
        if key == "scaling" and isinstance(value, (int, float)):
            dtype, device = self.layer._scalars()
            with torch.inference_mode(False):  # tensors of inference could not be kept for a backward pass
                value = torch.tensor(value, dtype=dtype, device=device)
        self.__dict__[key] = value

    def fits(self, like: tuple[torch.dtype, torch.device]) -> bool:
        """Whether the scaling is such a number."""
        held = self.__dict__.get("scaling")
        return (
            not isinstance(held, Tensor)
            or held is self.layer.adapters[self.name].scaling
            or (held.dtype, held.device) == like
        )


class Switched(nn.Module):
    """The part of a tuner layer that compiled code runs; `stack` and `_names` are the layer's.

    `_graph` is None where compiled code has to look at the layer's state: it then runs what other code runs.
    """

    call: Any
    view: Any
    adapters: dict[str, Adapter]
    stack: Callable[..., Stack]
    slots: Callable[[str], list[Any]]
    get_base_layer: Callable[[], nn.Module]
    _names: tuple[str, ...]
    _off: bool
    _merged: Any
    _read: str
    _flag: Tensor | None = None
    _graph: Any = None

    def _traced(self) -> bool:
        """A program is traced that runs this layer."""
        traced()
        if "_graph" not in self.__dict__:  # one graph of a repeated block is to serve all of them
            for layer in {id(x): x for x in (self, *self.call.beside())}.values():
                layer._ready()
        return self._ready()

    def _ready(self) -> bool:
        """The layer holds what graphs guard and run."""
        self._noted()
        d, like = self.__dict__, self._scalars()
        graph = d.get("_graph")
        stack = stack_of(graph)
        if stack is None or d["_flag"].device != like[1] or not all(twin.fits(like) for twin in stack.adapters):
            for p in self.adapters.values():
                p.twin = None
            d["_flag"] = self.call.flag(like[1], not self._off)
            self._regraph()
        return True

    def _noted(self) -> bool:
        """The layer holds its state itself, as what its class says of it is guarded, too: before a graph reads it."""
        self.__dict__.update(_names=self._names, _off=self._off)
        return True

    def _compiled(self) -> Any:
        """What a graph runs; None where it is what other code runs."""
        if not torch.compiler.is_dynamo_compiling() or exporting():
            traced()
            return None
        if frozen():
            traced()
            _ = ",".join(self._merged)  # a graph is guarded by what it looks at, and its constants are W with these
            return None
        self._traced()
        return self._graph

    def _read_in_graph(self) -> Any:
        """The stack whose weight and bias compiled code reads; None where it is not known to be one."""
        if not (self._read and torch.compiler.is_dynamo_compiling() and self.call.plain and self.call.only is None):
            return None
        return stack_of(self._compiled())

    def _without_gate(self) -> bool:
        """What is traced leaves no choice: the layer that is switched off is a graph of its own."""
        for twin in stack_of(self._graph).adapters:
            self.adapters[twin.name].gates = False
        return True

    for _hidden in (_traced, _noted, _without_gate):
        _hidden._dynamo_marked_constant = True  # type: ignore[attr-defined]
    del _hidden

    def _regraph(self) -> None:
        """The state of a layer that has been traced has changed."""
        d = self.__dict__
        d["_flag"] = self.call.flag(d["_flag"].device, not self._off)
        names = tuple(n for n in self._names if n in self.adapters)
        d["_graph"] = None
        usual = names and not self._merged and type(self.stack(())) is Stack and self.view.label != "Module"
        finishes = self.view.finishes(self.get_base_layer())
        chosen = not finishes and all(self.adapters[n].gates for n in names)
        if not usual or (self._off and not chosen):
            return
        found = Gated(self, tuple(self._twin(self.adapters[n]) for n in names))
        if found.packed is None or (self.view.activations and not found.again):
            d["_graph"] = InPlace(found) if not self.view.activations else Finish(found) if finishes else found

    def _scalars(self) -> tuple[torch.dtype, torch.device]:
        """What numbers beside the adapters' tensors look like: a scaling is as exact as it is where it is no tensor."""
        first = next((s.tensor for name in self.adapters for s in self.slots(name)), None)
        weight = self.view.sample(self.get_base_layer()) if first is None else first
        if weight is None:
            return torch.float32, torch.device("cpu")
        return torch.float64 if weight.dtype is torch.float64 else torch.float32, weight.device

    def _twin(self, p: Adapter) -> Adapter:
        """An adapter for graphs: the same, with a tensor for its scaling."""
        if p.twin is None:
            p.twin = twin = p.bound_to(self, Twin)
            twin.__dict__.update(cache=p.cache, shared=p.shared)
            if "scaling" in p.__dict__:
                twin.follow("scaling", p.scaling)
        twin = p.twin
        twin.direct = references(self, p.name) | {k: reference(home, p.name) for k, home in p.shared.items()}
        p.method.prepare(twin)
        twin.__dict__.update(hot=None, idle=p.idle)
        return twin
