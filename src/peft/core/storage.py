"""How a weight's numbers are held: read, write, save and restore them, and apply the weight as its library does.

A storage is found by the qualified class name of the weight, or of the module that holds it, so that no quantiser is
ever imported to be asked. A new one is one file in `peft/storages` with a subclass of `Packed`, registered by being
defined; those files are imported when the first weight of a class that torch does not define is met.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Hashable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.modes import HELD
from .memory import identity

Payload = dict[str, Any]


class Storage:
    """A dense tensor in any floating dtype: the values are the payload."""

    names: ClassVar[tuple[str, ...]] = ()  # qualified names of the weight's or the module's class; `*` stands for any
    weights: ClassVar[tuple[str, ...]] = ("weight",)  # which weights are meant where the module's class is named
    beside: ClassVar[tuple[str, ...]] = ()  # how the names of parameters end that belong to the payload of a weight
    label: ClassVar[str | None] = None  # of the library, as the status tells it
    packed: ClassVar[bool] = False  # reading makes the numbers anew, and writing rounds them
    trains: ClassVar[bool] = True  # the library's forward can be differentiated, and keeps no dense copy for that
    _all: ClassVar[list[Storage]] = []

    def __init_subclass__(cls) -> None:
        if cls.names:
            Storage._all.append(cls())

    def sample(self, module: nn.Module, name: str) -> Any:
        """A tensor that lies where the weight does; None where there is none."""
        return getattr(module, name, None)

    def holds(self, module: nn.Module, name: str) -> bool:
        """Whether this very module, found by its class, holds the weight in this form."""
        return True

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        """The shape of the numbers."""
        return tuple(getattr(module, name).shape)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        """The dtype in which `read` gives the numbers."""
        return cast(torch.dtype, getattr(module, name).dtype)

    def read(self, module: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The values as a dense tensor; for a dense storage the very tensor, not a copy, unless `dtype` is another."""
        value: Tensor = getattr(module, name)
        return value if dtype is None else value.to(dtype)

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Put dense values in place of the old ones, in the storage's own form."""
        getattr(module, name).data.copy_(value)

    def save(self, module: nn.Module, name: str) -> Any:
        """The payload, to be handed back to `restore`; what is written meanwhile does not change it."""
        return getattr(module, name).detach().clone()

    def restore(self, module: nn.Module, name: str, payload: Any) -> None:
        """Give back the payload bit for bit."""
        getattr(module, name).data.copy_(payload)

    def original(self, payload: Any) -> Tensor:
        """The values of a saved payload as a dense tensor."""
        return cast(Tensor, payload)

    def numel(self, module: nn.Module, name: str) -> int:
        """Number of logical parameters."""
        return cast(int, getattr(module, name).numel())

    def run(self, module: nn.Module, values: Mapping[str, Tensor], call: Callable[[], Any]) -> Any:
        """What `call`, which runs the module, gives with numbers in place of weights that the module reads itself.

        Raises NotImplementedError where the module's own code can only compute with what it holds.
        """
        raise NotImplementedError(
            f"{type(module).__name__} computes with its packed weights itself, so {sorted(values)} cannot be adapted "
            "as parameters. Target the module, or load the base model in a floating-point dtype."
        )

    def keep_dense(self, module: nn.Module, name: str, value: Tensor) -> bool:
        """Have the module itself compute with numbers; False where an ordinary module must stand in for it."""
        return False

    def key(self, module: nn.Module, name: str) -> Hashable:
        """Equal for two moments between which the numbers have not changed; None if that is not known."""
        return identity(getattr(module, name))

    def payload_key(self, payload: Any) -> Hashable:
        """The same for a saved payload."""
        return identity(payload)

    def adopt(self, module: nn.Module) -> None:
        """An adapter is put around the module: keep its library from changing the payload on its own."""

    def release(self, module: nn.Module) -> None:
        """The module stands alone again: undo `adopt`."""

    def differentiable(self, module: nn.Module, name: str) -> bool:
        """Whether the library's forward can be differentiated as the weight is held now."""
        return self.trains

    def apply(self, base: Callable[[nn.Module, Tensor], Tensor], view: Any, module: nn.Module, x: Tensor) -> Tensor:
        """W x + b as the library computes it; `base(module, x)` calls it."""
        return base(module, x)


class Packed(Storage):
    """A quantised weight. A subclass states how to find its payload, and how to turn it into numbers and back.

    A payload is a dict of what the numbers depend on: tensors, settings, opaque objects. It is never changed in place.
    """

    packed = True
    trains = False

    def take(self, module: nn.Module, name: str) -> Payload:
        """The payload, as it lies in the module."""
        raise NotImplementedError

    def look(self, module: nn.Module, name: str) -> Payload:
        """What `unpack` needs of the payload, for as long as nothing changes it."""
        return self.take(module, name)

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        """Have the module compute with a payload."""
        raise NotImplementedError

    def unpack(self, payload: Payload) -> Tensor:
        """The numbers in the stored layout, in the dtype that the library makes them in."""
        raise NotImplementedError

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        """Round numbers with the settings of a payload."""
        raise NotImplementedError

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        own = getattr(module, "compute_dtype", None)
        return own if isinstance(own, torch.dtype) else torch.float32

    def repack(self, value: Tensor, payload: Payload) -> Payload:
        """Round numbers to those that a payload can hold as its scales are; what is out of their range is cut.

        A weight that came out of the payload goes back into it unchanged, which `pack`, finding scales anew, cannot
        promise. Where scales cannot be kept it is the same as `pack`.
        """
        return self.pack(value, payload)

    def sample(self, module: nn.Module, name: str) -> Any:
        return next((t for t in self.take(module, name).values() if isinstance(t, Tensor)), None)

    def read(self, module: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
        with torch.no_grad():
            value = self.unpack(self.look(module, name))
            return value if dtype is None else value.to(dtype)

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        with torch.no_grad():
            self.put(module, name, self.pack(value, self.take(module, name)))

    def save(self, module: nn.Module, name: str) -> Any:
        return self.take(module, name)

    def restore(self, module: nn.Module, name: str, payload: Any) -> None:
        device = self.sample(module, name).device
        with torch.no_grad():
            self.put(module, name, {k: moved(v, device) for k, v in payload.items()})

    def original(self, payload: Any) -> Tensor:
        with torch.no_grad():
            return self.unpack(payload)

    def numel(self, module: nn.Module, name: str) -> int:
        return math.prod(self.shape(module, name))

    def key(self, module: nn.Module, name: str) -> Hashable:
        held = self.payload_key(self.take(module, name))  # a parameter's `data` does not count what is written into it
        return held and (held, *(p._version for p in module._parameters.values() if p is not None))

    def tensors(self, payload: Payload) -> list[Tensor]:
        """The tensors of a payload."""
        return [
            t
            for v in payload.values()
            for t in (v.values() if isinstance(v, Mapping) else (v,))
            if isinstance(t, Tensor)
        ]

    def payload_key(self, payload: Any) -> Hashable:
        keys = tuple(identity(t) for t in self.tensors(payload))
        return None if None in keys else keys

    def apply(self, base: Callable[[nn.Module, Tensor], Tensor], view: Any, module: nn.Module, x: Tensor) -> Tensor:
        b = view.bias(module)
        learns = b is not None and b.requires_grad
        if not torch.is_grad_enabled() or not (x.requires_grad or learns) or self.differentiable(module, view.name):
            return base(module, x)
        return cast(Tensor, Applied.apply(x, b if learns else None, base, view, module, self))

    def pull(self, module: nn.Module, name: str, grad: Tensor) -> Tensor | None:
        """grad W, (..., I), from (..., O) without making W, in the wider dtype; None where W has to be made."""
        return None


class Applied(torch.autograd.Function):
    """The library's forward, with the gradient of W x + b for the dense W; nothing but shapes is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, base: Any, view: Any, module: nn.Module, kind: Any) -> Tensor:
        ctx.parts = view, module, kind, x.shape, x.dtype
        y: Tensor = base(module, x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        view, module, kind, shape, dtype = ctx.parts
        from_x = from_b = None
        if ctx.needs_input_grad[0]:
            plain = view.label == "Linear" and view.dense
            from_x = kind.pull(module, view.name, grad) if plain else None
            if from_x is None:
                W = view.matrix(module, kind.read(module, view.name))
                compute = wider(grad.dtype, W.dtype)
                from_x = pulled(view, module, grad.to(compute), W.to(compute), shape)
            from_x = from_x.to(dtype)
        if ctx.needs_input_grad[1]:
            b = view.bias(module)
            with torch.enable_grad():
                b = b.detach().requires_grad_()
                (from_b,) = torch.autograd.grad(view.spread(module, b).expand_as(grad), b, grad.to(b.dtype))
        return from_x, from_b, None, None, None, None


def wider(one: torch.dtype, two: torch.dtype) -> torch.dtype:
    """The one of two dtypes with more bytes, the first of equals; bfloat16's small numbers would vanish in float16."""
    return one if one.itemsize >= two.itemsize else two


def pulled(view: Any, module: nn.Module, grad: Tensor, W: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of an input of a given shape from that of W x."""
    if view.dense and len(view.kernel(module)) == 0:
        return grad @ W
    with torch.enable_grad():
        x = torch.zeros(shape, dtype=W.dtype, device=W.device, requires_grad=True)
        return torch.autograd.grad(view.linear(module, x, W), x, grad)[0]


class Foreign(Storage):
    """A tensor class that is not known: it can be read if it says how to dequantise, and is never written."""

    packed = True

    def read(self, module: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
        value = getattr(module, name)
        if type(value).dequantize is not Tensor.dequantize:
            made: Tensor = value.dequantize()
            return made if dtype is None else made.to(dtype)
        raise NotImplementedError(
            f"The weight {name!r} of {type(module).__name__} is stored as {_kind(value)}, which cannot be read as "
            "numbers. Methods that only need the layer's forward work; this one needs the values."
        )

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        raise NotImplementedError(
            f"Cannot merge into {name!r} of {type(module).__name__}: it is stored as "
            f"{_kind(getattr(module, name))}, which cannot be written. Keep the adapter unmerged, merge with "
            'quantized="dequantize", or load the base model in a floating-point dtype and merge there.'
        )

    def save(self, module: nn.Module, name: str) -> Any:
        return getattr(module, name)

    def original(self, payload: Any) -> Tensor:
        return cast(Tensor, payload.dequantize())


def _kind(value: Tensor) -> str:
    """What a tensor is, beyond a plain one: its dtype or its class."""
    plain = type(value) in HELD
    return str(value.dtype) if plain else f"{type(value).__module__}.{type(value).__qualname__}"


def moved(value: Any, device: torch.device) -> Any:
    """A part of a payload on a device."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, Mapping):
        return {k: moved(v, device) for k, v in value.items()}
    return value


DENSE, _FOREIGN = Storage(), Foreign()
_OWN = ("torch.nn.modules.", "torch.nn.parameter.", "peft.", "transformers.models.", "transformers.pytorch_utils.")
_by_class: dict[type, Storage | None] = dict.fromkeys(HELD)


def named(module: nn.Module, name: str) -> Storage | None:
    """The storage of a weight that the class of its module tells; None where only the weight itself can."""
    found = by_class(type(module))
    return found if found is not None and name in found.weights and found.holds(module, name) else None


def of(module: nn.Module, name: str) -> Storage:
    """The storage of `module.<name>`."""
    value = module._parameters.get(name)
    if type(value) is nn.Parameter and _by_class.get(type(module), DENSE) is None and value.is_floating_point():
        return DENSE  # most are ordinary parameters of a class that is known to hold such
    if (found := named(module, name)) is not None:
        return found
    value = getattr(module, name)
    if (found := by_class(type(value))) is not None:
        return found
    packed = not (value.is_floating_point() or value.is_complex()) or hasattr(value, "__tensor_flatten__")
    return _FOREIGN if packed and type(value).__name__ != "DTensor" else DENSE


def sample(module: nn.Module, name: str) -> Any:
    """A tensor that lies where a module's weight does, or None."""
    found, value = named(module, name), None
    if found is None and name:
        value = getattr(module, name, None)
        found = None if value is None else by_class(type(value))
    return value if found is None else found.sample(module, name)


def packed(module: nn.Module, name: str) -> Storage | None:
    """The storage of a weight that is not dense, else None."""
    if not name:
        return None
    found = of(module, name)
    return found if found.packed else None


def parameters(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and number of dimensions of the parameters that a module has: of a packed weight as its numbers are."""
    mine, others = _of_module(module)
    yield from ((name, len(kind.shape(module, name))) for kind, name in mine)
    yield from ((name, p.dim()) for name, p in others)


def counts(module: nn.Module) -> Iterator[tuple[Hashable, bool, int]]:
    """(what tells it from others, whether it is trainable, number) of a module's own parameters, packed or not."""
    mine, others = _of_module(module)
    for found, name in mine:
        yield (id(module), name), False, found.numel(module, name)
    for name, p in others:
        kind = by_class(type(p))
        count = p.numel() if kind is None else kind.numel(module, name)
        yield id(p), p.requires_grad, count or int(getattr(p, "ds_numel", 0))  # ZeRO-3 keeps none of it here


def _of_module(module: nn.Module) -> tuple[list[tuple[Storage, str]], list[tuple[str, nn.Parameter]]]:
    """(the weights that the module's class tells, with their storage; the parameters that are no part of these)."""
    found, held = by_class(type(module)), [(n, p) for n, p in module._parameters.items() if p is not None]
    if found is None:
        return [], held
    mine = [n for n in found.weights if found.holds(module, n)]
    return [(found, n) for n in mine], [(n, p) for n, p in held if n not in mine and not n.endswith(found.beside)]


def by_class(kind: type) -> Storage | None:
    """The storage that names a class of weights or modules, or a class above it."""
    try:
        return _by_class[kind]
    except KeyError:
        _by_class[kind] = found = _find(kind)
        return found


def _find(kind: type) -> Storage | None:
    names = [f"{c.__module__}.{c.__qualname__}" for c in kind.__mro__ if c not in HELD and c is not object]
    foreign = [n for n in names if not n.startswith(_OWN)]
    if not foreign:
        return None
    _define()
    for name in foreign:
        matching = [s for s in Storage._all if any(fnmatchcase(name, pattern) for pattern in s.names)]
        if matching:
            return next((s for s in matching if name in s.names), matching[0])  # the exact name before a family's
    return None


def _define() -> None:
    """Import every file of `peft/storages`; none of them imports its library."""
    package = importlib.import_module("..storages", __package__)
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")
