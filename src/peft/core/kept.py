"""What an adapter's tensors amount to, kept between forwards of evaluation for as long as they stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..kernels import modes
from ..kernels.modes import lifted, transformed

if TYPE_CHECKING:
    from .method import LowRank
    from .stack import Adapter


is_tracing = torch._C._is_tracing  # by torch.jit, which takes for a constant what no operation makes
KEPT = ("kept", "factors", "gain")  # what an adapter may hold


class Keeping:
    """Whether evaluation keeps anything at all."""

    def __init__(self) -> None:
        self.on = True


KEEPING = Keeping()


class Steps:
    """How many steps optimizers have taken in this process: fused ones write numbers that torch does not count."""

    def __init__(self) -> None:
        self.taken = 0
        register_optimizer_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():  # compiled steps are counted by torch
            self.taken += 1


STEPS = Steps()


class Kept:
    """A value, and what it was made of, as that was; a copy of this holds nothing.

    Arguments:
        value: the value.
        layer: the tuner layer; its copies for data parallelism share its notes, and have other tensors.
        places: (dictionary, key) of the tensors and numbers that it was made of, and of the modules that hold them.
    """

    def __init__(self, value: Any = None, layer: Any = None, places: Sequence[tuple[dict[str, Any], str]] = ()):
        self.value, self.layer = value, None if layer is None else weakref.ref(layer)
        self.places = [(where, key, where.get(key)) for where, key in places]
        tensors = [t for *_, t in self.places if isinstance(t, Tensor)]
        # a reference to memory keeps its number from being given to other memory, and none of its bytes
        owners = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        self.tensors = [(t, t._version, t.data_ptr(), o) for t, o in zip(tensors, owners, strict=True)]

    def holds(self, layer: Any) -> bool:
        """Whether everything of the layer is in its place, and the tensors hold the numbers of then."""
        if self.layer is None or self.layer() is not layer:
            return False
        for where, key, found in self.places:
            if where.get(key) is not found:
                return False
        for t, version, address, owner in self.tensors:
            if t._version != version or t.data_ptr() != address or t.untyped_storage()._cdata != owner.cdata:
                return False
        return True

    def __reduce__(self) -> Any:
        return Kept, ()


def kept(p: Adapter, make: Callable[[], Any], base: bool = False, what: str = "kept") -> Any:
    """What `make` gives, made again only when a tensor of the adapter, or a number such as its scaling, has changed.

    Arguments:
        p: the adapter.
        make: makes it.
        base: whether it depends on the base weight, too, which is that of a dense layer.
        what: of `KEPT`; a method's factors are kept apart from what another method makes of them.

    Training makes it each time, and forgets it: optimisers may write numbers in ways that torch does not count.
    """
    found = still(p, what)
    if found is not None:
        return found
    value = make()
    if lasting(p) and not (base and computed(p)):
        mine = places_of(p)
        places = [*mine, *(base_places(p) if base else ()), (vars(STEPS), "taken")]
        counted = not any(isinstance(t := where.get(key), Tensor) and t.is_inference() for where, key in places)
        if counted and not any(isinstance(t := where.get(key), Tensor) and lies_shared(t) for where, key in mine):
            p.cache[what] = Kept(value, p.layer, places)
    return value


def kept_over(p: Adapter, make: Callable[[], Any]) -> Any:
    """`kept` of what depends on a quantised base weight, too, whose storage tells whether it has changed."""
    key = p.layer.original_key(None) if lasting(p) else None
    if key is None:
        return make()
    found = still(p)
    if found is not None and found[0] != key:
        p.cache.pop("kept")
    return kept(p, lambda: (key, make()))[1]


def kept_factors(method: LowRank, p: Adapter) -> tuple[Tensor, Tensor]:
    """The factors of the method's update, as evaluation keeps them if they are dear."""
    return kept(p, lambda: method.factors(p), what="factors") if method.keeps_factors else method.factors(p)


def computed(p: Adapter) -> bool:
    """Whether the base weight is computed at each call (parametrized, normed, pruned): nobody knows of what."""
    return p.layer.view.name not in p.layer.get_base_layer()._parameters and not p.layer.packed


def lies_shared(t: Tensor) -> bool:
    """Whether another process may write into a tensor, which is not counted here."""
    return t.is_cpu and t.untyped_storage().is_shared()


def still(p: Adapter, what: str = "kept") -> Any:
    """What is kept, if it holds; else None."""
    if torch.compiler.is_compiling() or not KEEPING.on:
        return None
    found = p.cache.get(what)
    if found is None:
        return None
    if not (p.layer.training or torch.is_grad_enabled() or lifted() or is_tracing()) and found.holds(p.layer):
        return found.value
    p.cache.pop(what, None)
    return None


def lasting(p: Adapter) -> bool:
    """Whether what is made now may serve later forwards."""
    quiet = not (p.layer.training or torch.is_grad_enabled() or transformed() or is_tracing())
    return KEEPING.on and quiet and modes.lasting()


def places_of(p: Adapter) -> list[tuple[dict[str, Any], str]]:
    """Where the tensors and numbers of an adapter stand, those that layers share among them."""
    found: list[tuple[dict[str, Any], str]] = []
    homes: list[tuple[dict[str, Any], str]] = []
    for key, home in p.layer._modules.items():
        if key == "base_layer" or home is None:
            continue
        for held in (home._modules, home._parameters, home._buffers):
            if held.get(p.name) is not None:
                homes.append((p.layer._modules, key))
                found.append((held, p.name))
    for where, key in found:  # grows on the way
        if isinstance(where[key], nn.Module):
            m = where[key]
            found += [(d, k) for d in (m._modules, m._parameters, m._buffers) for k in d if d[k] is not None]
    for home in p.shared.values():
        found += [(held, p.name) for held in (home._parameters, home._buffers) if held.get(p.name) is not None]
    numbers = (k for k, v in p.__dict__.items() if type(v) is int or isinstance(v, (float, Tensor)))
    return [*homes, *found, *((p.__dict__, k) for k in numbers)]


def base_places(p: Adapter) -> list[tuple[dict[str, Any], str]]:
    """Where the base weight stands, and what is kept of it while adapters are merged."""
    base = (p.layer.get_base_layer()._parameters, p.layer.view.name)
    return [(p.layer._modules, "base_layer"), base, (p.layer.__dict__, "_saved")]


class Forgetful(nn.Module):
    """The part of a tuner layer that forgets what is kept when it is put into training or evaluation."""

    adapters: dict[str, Adapter]

    def train(self, mode: bool = True) -> Any:
        """As torch's; what evaluation has kept is made anew afterwards."""
        for p in self.adapters.values():
            for what in KEPT:
                p.cache.pop(what, None)
        return super().train(mode)
