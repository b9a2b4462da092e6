"""One adapter's share of a layer, and the base layer under some adapters as one affine map."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.modes import single, transformed
from .cells import Cell
from .method import Method
from .nested import by_rows
from .reading import update
from .turns import turn
from .views.chosen import Chosen, composed

_state = threading.local()
NOTED = frozenset({"hot", "direct", "plan", "twin", "gates"})  # of the layer's state, and no part of the adapter


class Slot(NamedTuple):
    """One tensor of an adapter: where it stands in files, in the model, and who holds it."""

    key: str  # relative to the layer's path, without the adapter's name
    live: str  # relative to the layer's path, as in the model's state_dict
    owner: nn.Module
    attr: str

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        held = self.owner._parameters.get(self.attr)
        return self.owner._buffers[self.attr] if held is None else held  # type: ignore[return-value]


class Adapter:
    """`p`: one adapter's share of one layer. `p.lora_A` is `layer.lora_A[name]`, `p.scaling` a plain value."""

    written: ClassVar[int] = 0  # how often a plain value of any adapter was set
    twin: Any = None  # what compiled code runs in its place, once it does
    gates = True  # and whether a tensor can switch that off

    def __init__(self, layer: Any, name: str, method: Method, settings: Any, path: str):
        self.__dict__.update(layer=layer, name=name, method=method, settings=settings, path=path)
        self.direct: dict[str, Any] = {}  # under compile tensors are found by reference, so that names are not guarded
        self.cache: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}  # what all layers of the adapter share: name -> SharedTensors
        self.idle: tuple[str, ...] = ()  # modules that do nothing, and are made when somebody asks the layer for them
        self.plan: Any = None  # what the layer runs with this adapter alone, once it has
        self.hot: Any = None  # what the method's shortcut needs, noted when the layer's state changes

    def __setattr__(self, key: str, value: Any) -> None:
        self.__dict__[key] = value
        if key not in NOTED:
            Adapter.written += 1
            if self.twin is not None:
                self.twin.follow(key, value)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__") or "layer" not in self.__dict__:
            raise AttributeError(key)
        if torch.compiler.is_dynamo_compiling():
            return self.referred(key)
        home = self.layer._modules.get(key)
        if home is None and key in self.shared:
            return self.shared[key].tensor(self.name)
        if home is None and key in self.idle:
            home = getattr(self.layer, key)
        if home is None or self.name not in home:
            raise AttributeError(f"The adapter {self.name!r} has no {key!r}.")
        return home[self.name]

    def referred(self, key: str) -> Any:
        """The module or tensor `key`, found without the adapter's name."""
        found = self.direct[key]
        return found.tensor if type(found) is Cell else found

    def bound_to(self, layer: Any, kind: Any = None) -> Any:
        """The same adapter in a copy of its layer, or as an adapter of another class."""
        other = (kind or Adapter)(layer, self.name, self.method, self.settings, self.path)
        other.__dict__.update({k: v for k, v in self.__getstate__().items() if k not in other.__dict__})
        other.idle = self.idle
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "twin"}

    def everywhere(self) -> Adapter:
        """The adapter of a method for some positions, acting on all of them."""
        twin = self.bound_to(self.layer)
        twin.method, twin.hot = self.method.everywhere, None
        return twin

    def has(self, key: str) -> bool:
        """Whether the adapter owns a tensor or module `key`."""
        if torch.compiler.is_dynamo_compiling():
            return key in self.direct
        home = self.layer._modules.get(key)
        return home is not None and self.name in home

    def held(self, key: str) -> Any:
        """The module or parameter `key`, found by the shortest way."""
        if torch.compiler.is_dynamo_compiling():
            return self.referred(key)
        home = self.layer._modules[key]
        found = home._modules.get(self.name)
        if found is None and self.name in home._parameters:
            found = home._parameters[self.name]  # so asked, ZeRO-3 gathers it
        return getattr(home, self.name) if found is None else found  # a replica's tensors are plain attributes

    def held_buffer(self, key: str) -> Tensor:
        """A derived tensor; made now if the base weight had no numbers when the adapter was made."""
        if torch.compiler.is_dynamo_compiling():
            return self.referred(key)
        try:
            return getattr(self.layer._modules[key], self.name)
        except (KeyError, AttributeError):
            self.layer.derive(self, key)
        return getattr(self.layer._modules[key], self.name)

    def drop_rate(self, key: str) -> float:
        """The rate of the dropout module `key`, 0 outside training."""
        if key in self.idle and key not in self.layer._modules:
            return 0.0
        drop = self.held(key)
        return drop.p if drop.training and type(drop) is not nn.Identity else 0.0

    def original_weight(self) -> Tensor:
        """The base weight without any merged adapter, (..., O, I)."""
        return self.layer.original_weight()


class Stack:
    """The base layer under its first adapters, still an affine map: call it, or ask its weight and bias."""

    gated: ClassVar[bool] = False  # a tensor chooses between what is made with it and what the base gives

    def __init__(self, layer: Any, adapters: tuple[Adapter, ...], extra: Any = None, outer: bool = True):
        self.layer, self.view, self.adapters, self.extra = layer, layer.view, adapters, extra
        self.packed = layer.packed
        self.again = outer and self.packed is not None and any(a.method.keeps(a) for a in adapters)
        self.last = adapters[-1] if adapters else None
        self.inner = Stack(layer, adapters[:-1], extra, outer=False) if adapters else None

    @property
    def root(self) -> Stack:
        """The base layer alone."""
        return Stack(self.layer, (), self.extra) if self.adapters else self

    @property
    def base(self) -> nn.Module:
        return self.layer.get_base_layer()

    def __call__(self, x: Tensor) -> Tensor:
        last = self.last
        if last is not None:
            if x.is_nested and self.view.dense:
                return by_rows(self, x)
            if self.again and torch.is_grad_enabled():
                return checkpoint(last.method.forward, last, self.inner, x, use_reentrant=False)
            return last.method.forward(last, self.inner, x)
        if self.packed is not None:
            return self.packed.apply(self._call_base, self.view, self.base, x)
        return self._call_base(self.base, x)

    def _call_base(self, _: nn.Module, x: Tensor) -> Tensor:
        base = self.layer._modules["base_layer"]
        if self.extra is not None:
            y = self.view.output(base(x, *self.extra[0], **self.extra[1]))
            if not torch.compiler.is_compiling():
                self.layer.__dict__["told_more"] = True  # which a merge asks
        else:
            y = self.view.base(base, x)
        if not isinstance(y, Tensor):
            path = next(iter(self.layer.adapters.values())).path
            raise TypeError(
                f"{path!r}, a {type(base).__name__}, returns no tensor but a {type(y).__name__}, so an adapter cannot "
                "change its output. Adapt a layer inside it, or leave it out with exclude_modules."
            )
        return y

    def outline(self) -> Tensor:
        """W without its numbers, where only shape, dtype and device are asked for; W itself where reading it is free.

        What a packed weight gives takes no memory, and every element is NaN.
        """
        if self.packed is None:
            return self.live_weight()
        dtype, device = self.packed.dtype(self.base, self.view.name), self.view.sample(self.base).device
        return torch.full((), torch.nan, dtype=dtype, device=device).expand(self.view.shape(self.base))

    def weight(self, rows: slice = slice(None)) -> Tensor:
        """W' of the stack, (..., rows, I); over a packed weight in single precision, as rounding comes later."""
        W = self.layer.base_weight()[..., rows, :]
        W = W if self.packed is None else single(W)
        for a in self.adapters:
            W = a.method.weight(a, W, rows)
        return W

    def live_weight(self) -> Tensor:
        """W' of the stack as a forward uses it: in training, parts of it may be dropped by chance."""
        W = self.layer.base_weight()
        for a in self.adapters:
            W = a.method.live_weight(a, W)
        return W

    def chosen(self) -> Tensor | None:
        """`live_weight` of experts, which is made for those alone that are asked for; None where it has to be made."""
        if self.packed is not None or type(self) is not Stack or transformed():
            return None
        base = self.base
        W = self.layer.base_weight() if "_hf_hook" in base.__dict__ else self.view.read(base)
        terms = []
        for a in self.adapters:
            term = update(a, W)
            if term is None:
                return None
            terms.append(term)
        gain, found = composed(terms)
        return Chosen.of(W, found, gain=gain)

    def bias(self) -> Tensor | None:
        """b' of the stack, (O,), or None."""
        b = self.view.bias(self.base)
        for a in self.adapters:
            b = a.method.bias(a, b)
        return b

    def shown_bias(self) -> Tensor | None:
        """b' for a module that reads it: where it has none of its own, in the dtype of its weight."""
        b = self.bias()
        own = b is None or self.packed is not None or self.view.bias(self.base) is not None
        return b if own else b.to(self.view.sample(self.base).dtype)  # type: ignore[union-attr]

    def stored(self, name: str, value: Tensor) -> Tensor:
        """A value as the module holds its tensor `name`."""
        return value

    def linear(self, x: Tensor, W: Tensor) -> Tensor:
        """W x without bias, in W's dtype."""
        return self.view.linear(self.base, x.to(W.dtype) if x.is_floating_point() else x, W)

    def spread(self, v: Tensor) -> Tensor:
        """(O,) shaped to broadcast over an output."""
        return self.view.spread(self.base, v)

    def drop(self, x: Tensor, rate: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Dropout of an input: (x to use, factor for W x or None)."""
        x = x.to(dtype) if x.is_floating_point() else x
        return self.view.drop(x, rate) if rate else (x, None)

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, rate: float = 0.0, scale: Any = 1.0, bias: Tensor | None = None
    ) -> Tensor:
        """scale (B A dropout(x) + bias) in the factors' dtype, on any layout that can be split into activations."""
        h = self.view.shrunk(self.base, x, A, rate)
        if h is None:
            x, factor = self.drop(x, rate, A.dtype)
            h = self.linear(x, A)
            h = h if factor is None else h * factor.to(h.dtype)
        if type(scale) is float and scale == 1.0:
            return self.view.rows(h, B, bias)
        return self.view.rows(h * scale, B, None if bias is None else bias * scale)

    def gate(self, changed: Tensor, W: Tensor) -> Tensor:
        """The weight that a shortcut makes its output with, in place of the base's."""
        return changed

    def each_token(self, x: Tensor, run: Callable[[Stack], Tensor]) -> Tensor:
        """What `run` makes of x with this stack, where it asks for its weight.

        An adapter that acts on some positions of x only has no one weight. `run` is then called without it and with it
        on all of them, and each position takes its own result.
        """
        late = next((a for a in self.adapters if a.method.some_positions), None)
        if late is None:
            return run(self)
        without, everywhere = (self._replaced(late, by) for by in ((), (late.everywhere(),)))
        y, acting = without.each_token(x, run), late.method.acting(late, x)
        return y if acting is None else torch.where(acting, everywhere.each_token(x, run), y)

    def _replaced(self, adapter: Adapter, by: tuple[Adapter, ...]) -> Stack:
        at = self.adapters.index(adapter)
        return Stack(self.layer, (*self.adapters[:at], *by, *self.adapters[at + 1 :]), self.extra)

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """W x + b."""
        y = self.linear(x, W)
        return y if b is None else y + self.spread(b).to(y.dtype)


class InPlace:
    """Runs a module that cannot be split into W x + b, with W' and b' put in place."""

    def __init__(self, stack: Stack):
        self.stack, self.by_task = stack, any(a.method.by_task for a in stack.adapters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        if self.by_task and stack.layer.call.task is None:
            return stack.layer.each_task(stack.adapters[0].path, args, kwargs, self.run)
        if stack.packed is not None and torch.is_grad_enabled() and not getattr(_state, "again", False):
            return checkpoint(self._again, args, kwargs, use_reentrant=False)  # keeps no numbers of W
        return self.run(args, kwargs)

    def _again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`run`, which the backward pass calls once more with all that stands inside."""
        _state.again = True
        try:
            return self.run(args, kwargs)
        finally:
            _state.again = False

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module under one W'; other threads wait, as they would find that in place of W."""
        if torch.compiler.is_compiling():
            return self._exchanged(args, kwargs)
        with turn(self.stack.base):
            return self._exchanged(args, kwargs)

    def _exchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stack, view = self.stack, self.stack.view
        base = stack.base
        W = stack.chosen()
        values = {view.name: stack.stored(view.name, view.raw(base, stack.live_weight() if W is None else W))}
        b = stack.shown_bias() if view.bias_name else None
        if b is not None and b is not view.bias(base):
            values[view.bias_name] = stack.stored(view.bias_name, b)
        return view.run(base, values, stack.layer._modules["base_layer"], args, kwargs)


class Late:
    """What a copy of a layer for data parallelism runs: its tensors arrive after the copy is made."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        return layer._runner(layer.stack(layer._live_names()))(*args, **kwargs)


class Finish:
    """A stack whose module does something after the affine map (an embedding with max_norm), or gives more than it."""

    def __init__(self, stack: Stack):
        self.stack = stack

    def __call__(self, x: Tensor) -> Tensor:
        return self.stack.view.finish(self.stack.base, self.stack(x))


def stack_of(run: Any) -> Any:
    """The stack that runs, in whatever runs it; None where nothing does."""
    return run.stack if isinstance(run, (InPlace, Finish)) else run


class Values(MutableMapping[str, Any], dict[str, Any]):  # type: ignore[metaclass, misc]
    """A plain value of every adapter of a layer, by adapter name: `layer.scaling["default"]`.

    It is a dictionary to whoever asks (json, isinstance), and what is written goes into the adapters. A copy is a
    dictionary of its own.
    """

    def __init__(self, layer: Any, key: str):
        self._layer, self._key = layer, key
        dict.update(self, {n: a.__dict__[key] for n, a in layer.adapters.items() if key in a.__dict__})

    def __getitem__(self, name: str) -> Any:
        return self._layer.adapters[name].__dict__[self._key]

    def __setitem__(self, name: str, value: Any) -> None:
        layer = self._layer
        setattr(layer.adopt(name) if layer.by_hand else layer.adapters[name], self._key, value)

    def __delitem__(self, name: str) -> None:
        del self._layer.adapters[name].__dict__[self._key]

    def __iter__(self) -> Iterator[str]:
        return (n for n, a in self._layer.adapters.items() if self._key in a.__dict__)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(self.copy())

    def copy(self) -> dict[str, Any]:
        """The values as they are now."""
        return {name: self[name] for name in self}

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)
