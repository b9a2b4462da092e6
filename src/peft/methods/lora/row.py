"""A single row through LoRA or DoRA in evaluation, as in decoding, and DoRA's training: few functions to the products.

A large matrix leaves nothing of the layers' state in the caches, and each object that is looked at costs as much as
many instructions. So what was found when the layer's state changed lies in one tuple, and one function asks whether it
still holds: the modules in their places, without hooks or patches, and torch running operations as they are written.
Where it does not, and for everything else, the method's `forward` decides, which makes what DoRA keeps.
"""

from __future__ import annotations

from operator import is_not
from typing import Any, ClassVar

import torch
from torch import _C, Tensor, nn
from torch.autograd import forward_ad

from ...core.direct import EVERYWHERE, FORWARD, TURNED, is_product, matrix
from ...core.kept import KEEPING, STEPS, still
from ...core.stack import Adapter, Stack
from ...core.views import Linear
from ...kernels import choice, narrow, scaled
from ...kernels.modes import NARROW, PLAIN, WIDE

peek, get = _C._functorch.peek_interpreter_stack, dict.get
owner = Tensor.untyped_storage
TAKEN = {(kind, torch.float32) for kind in NARROW} | {(kind, kind) for kind in WIDE}  # of the layer, of its factors
HOMES = ("lora_A", "lora_B", "lora_dropout")
NEVER = {"training": False}  # in place of a dropout that is not there
Place = tuple[dict[str, Any], str, Any]  # a table, and what it is to have under a key


class Row(Stack):
    """The base layer under one LoRA adapter; `long` is the same without the short way."""

    last: Adapter
    inner: Stack
    learn: ClassVar[Any] = None  # what makes the output where gradients are wanted, if that is no affair of `forward`
    _written = -1  # plain values of adapters that had been set when they were read

    def __init__(self, stack: Stack):
        self.__dict__.update(stack.__dict__)
        self.long = stack
        self._notes: list[tuple[Any, ...] | None] = [None, None]  # without and with gradients

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_notes": [None, None]}  # a copied module has a table of its own

    def __call__(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled()
        if learns and self.learn is None:
            return self.long(x) if x.is_nested else self.last.method.forward(self.last, self.inner, x)
        noted = self._notes[learns] if self._written == Adapter.written else None
        noted = self._note(learns) if noted is None else noted
        if not noted or x.is_nested or not (learns or x.numel() == noted[0]):
            return self.long(x)
        d, scale, kept, hooks, beside, base, A, B, held, held_A, held_B, of_base, of_A, of_B, m, name, *homes = noted
        home_A, home_B, drop, in_A, in_B, of_drop, kind, forward, turned = homes
        W, a, up = held.get("weight"), held_A.get("weight"), held_B.get("weight")  # which some libraries take away
        b, dtype, shape = held.get("bias", held), x.dtype, x.shape
        same = type(W) is type(a) is type(up) is nn.Parameter and (b is None or type(b) is nn.Parameter)
        same = same and W.dtype is dtype and a.dtype is up.dtype and (dtype, a.dtype) in TAKEN and shape[-1] == d
        same = same and type(A) is type(B) is Linear and nn.Linear.forward is FORWARD and kind.forward is forward
        same = same and m["base_layer"] is base and m["lora_A"] is home_A and m["lora_B"] is home_B and len(shape) > 1
        same = same and in_A[name] is A and in_B[name] is B and m.get("lora_dropout") is drop and type(base) is kind
        more_than = of_drop["training"] or "forward" in of_base or "forward" in of_A or "forward" in of_B or any(hooks)
        more_than = more_than or "_forward_hooks" in of_A or "_forward_hooks" in of_B or any(EVERYWHERE) or not x.is_cpu
        more_than = more_than or "cpu" in choice.devices or type(x) not in PLAIN or peek() is not None
        if not same or more_than or _C._is_tracing() or forward_ad._current_level >= 0 or _C._is_any_autocast_enabled():
            return self.long(x)
        if beside and any(map(is_not, map(get, beside[0], beside[1]), beside[2])):
            return self._anew(x)
        W, v = W.mT if turned else W, x if learns else x.view(-1)
        if learns:
            return self.learn(x, W, b, a, up, scale, kept)
        if kept is None:
            if dtype is not a.dtype:
                return narrow.row(x, W, b, a, up, scale)
            y = W.mv(v) if b is None else torch.addmv(b, W, v)
            return y.addmv_(up, a.mv(v), alpha=scale).view(*shape[:-1], -1)
        size, gain, gained, marks = kept
        seen = (W._version, a._version, up._version, size._version, W.data_ptr(), a.data_ptr(), up.data_ptr())
        if (*seen, size.data_ptr(), owner(W)._cdata, owner(a)._cdata, owner(up)._cdata, owner(size)._cdata) != marks:
            return self._anew(x)
        if dtype is not a.dtype:
            return narrow.gained(x, W, b, a, gain, gained)
        y = W.mv(v).mul_(gain) if b is None else torch.addcmul(b, W.mv(v), gain)
        return y.addmv_(gained, a.mv(v)).view(*shape[:-1], -1)

    def _anew(self, x: Tensor) -> Tensor:
        """The long way, after which the next row looks at everything anew."""
        self._notes = [None, None]
        return self.long(x)

    def _note(self, learns: bool) -> tuple[Any, ...] | None:
        """What `__call__` takes; nothing where there is no short way, None where there is none yet."""
        if self._written != Adapter.written:
            self.__dict__.update(_written=Adapter.written, _notes=[None, None])
        p = self.last
        self._notes[learns] = ()
        if p.hot is not None and self.extra is None and is_product(p.hot[0]) and p.method.by_row(p):
            base, A, B, _, hooks = p.hot
            modules = self.layer._modules
            homes = [modules.get(key) for key in HOMES]
            inside = [None if home is None else home._modules for home in homes]
            drop = dropout(homes[2], p)
            places: list[Place] = [] if inside[2] is None else [(inside[2], p.name, inside[2].get(p.name))]
            kept = self._taught(places) if learns else self._kept(places)
            own = [module._parameters for module in (base, A, B)] + [module.__dict__ for module in (base, A, B)]
            of_drop = NEVER if drop is None or learns else drop.__dict__
            kind, beside = type(base), tuple(zip(*places, strict=True))
            noted = (A.in_features, p.scaling, kept, hooks, beside, base, A, B, *own)  # as `__call__` takes it apart
            noted += (modules, p.name, *homes, *inside[:2], of_drop, kind, kind.forward, kind in TURNED)
            self._notes[learns] = noted if kept is not None or type(self) is Row else None
        return self._notes[learns]

    def _kept(self, places: list[Place]) -> tuple[Any, ...] | None:
        """What is kept beside the tensors, and how these were when it was made; what it is kept of joins the places."""
        return None

    _taught = _kept


class Gained(Row):
    """The same under a gain for each out-feature (DoRA), for as long as the one that evaluation keeps holds.

    In training the gain is made of the tensors as they are, and of the square norms that are kept of W.
    """

    def learn(self, x: Tensor, W: Any, b: Any, a: Any, up: Any, scale: float, kept: tuple[Any, ...]) -> Tensor:
        """m / |V| V x + b, V = W + scale B A, where gradients are wanted."""
        m, squares, drop, *marks = kept
        if W.requires_grad or x.dtype is not torch.float32 or m.dtype is not x.dtype:
            return self.long(x)
        if [W._version, W.data_ptr(), owner(W)._cdata] != marks:
            return self._anew(x)
        rate = drop.p if drop is not None and drop.training else 0.0
        return scaled.fused(x, W, b, a, up, scale, rate, m, None, squares)

    def _taught(self, places: list[Place]) -> tuple[Any, ...] | None:
        p, base = self.last, self.last.hot[0]
        W = base._parameters.get("weight")
        if p.layer is not self.layer or type(W) is not nn.Parameter:
            return None
        if p.method.squares_now(p, matrix(base, W)) is None:
            return None
        found, M = p.cache.get("noted"), p.lora_magnitude_vector
        if found is None or found.tensors[0][0] is not W or type(M.weight) is not nn.Parameter:
            return None
        places += self._beside(M, (base, M))
        _, version, address, memory = found.tensors[0]
        drop = dropout(self.layer._modules.get("lora_dropout"), p)
        return (M.weight, found.value, drop, version, address, memory.cdata)

    def _beside(self, M: nn.Module, modules: tuple[nn.Module, ...]) -> list[Place]:
        """Where the magnitude stands, the weights of these modules, and what tells of merges."""
        d = self.layer.__dict__
        weights = [(of._parameters, "weight", of._parameters.get("weight")) for of in modules]
        return [
            *standing(self.layer._modules, "lora_magnitude_vector", self.last, M),
            *weights,
            (d, "_saved", d.get("_saved")),
        ]

    def _kept(self, places: list[Place]) -> tuple[Any, ...] | None:
        p, layer = self.last, self.layer
        if p.layer is not layer or still(p) is None:
            return None
        found, M = p.cache["kept"], p.lora_magnitude_vector
        places += self._beside(M, (*p.hot[:3], M))
        places += [
            (vars(STEPS), "taken", vars(STEPS)["taken"]),
            (p.cache, "kept", found),
            (layer.__dict__, "training", False),
            (vars(KEEPING), "on", True),
        ]
        tensors = [held for _, key, held in places if key == "weight"]
        then = {id(t): marks for t, *marks in found.tensors}
        seen = {(id(table), key) for table, key, _ in places} | {
            (id(layer._modules), k) for k in ("base_layer", *HOMES)
        }
        seen |= {(id(layer._modules[key]._modules), p.name) for key in HOMES[:2]}
        if then.keys() != {id(t) for t in tensors} or not seen >= {
            (id(table), key) for table, key, _ in found.places if table is not p.__dict__
        }:
            return None
        versions, addresses, owners = zip(*(then[id(t)] for t in tensors), strict=True)
        return (tensors[-1], *found.value[1:], (*versions, *addresses, *(o.cdata for o in owners)))


def dropout(home: nn.Module | None, p: Adapter) -> Any:
    """The adapter's dropout, if it has one that does something in training."""
    found = None if home is None else home._modules.get(p.name)
    return None if type(found) is nn.Identity else found


def standing(modules: dict[str, Any], key: str, p: Adapter, module: nn.Module) -> list[Place]:
    """Where the adapter's module `key` stands."""
    home = modules[key]
    return [(modules, key, home), (home._modules, p.name, module)]
