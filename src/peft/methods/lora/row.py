"""A single row through LoRA or DoRA in evaluation, as in decoding: one function from the layer to the products.

A large matrix leaves nothing of the layers' state in the caches, and each object that is looked at costs as much as
many instructions. So what was found when the layer's state changed lies in one tuple, and one function asks whether it
still holds: the modules in their places, without hooks or patches, and torch running operations as they are written.
Where it does not, and for everything but a single row, the method's `forward` decides, which makes what DoRA keeps.
"""

from __future__ import annotations

from operator import is_not
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.autograd import forward_ad

from ...core.direct import EVERYWHERE, FORWARD
from ...core.kept import still
from ...core.stack import Adapter, Stack
from ...core.views import Linear
from ...kernels import choice
from ...kernels.thin import PLAIN, WIDE

peek_interpreter_stack, get = _C._functorch.peek_interpreter_stack, dict.get
owner = Tensor.untyped_storage
Place = tuple[dict[str, Any], str, Any]  # a table, and what it is to have under a key


class Row(Stack):
    """The base layer under one LoRA adapter; `long` is the same without the short way."""

    last: Adapter
    inner: Stack
    _written = -1  # plain values of adapters that had been set when they were read

    def __init__(self, stack: Stack):
        self.__dict__.update(stack.__dict__)
        self.long = stack
        self._noted: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_written": -1, "_noted": None}  # a copied module has a table of its own

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.last.method.forward(self.last, self.inner, x)
        noted = self._noted if self._written == Adapter.written else self._note()
        if noted is None or x.is_nested or x.numel() != noted[0]:
            return self.long(x)
        d, scale, kept, base, A, B, held, held_A, held_B, hooks, tables, keys, wanted = noted
        W, a, up = held.get("weight"), held_A.get("weight"), held_B.get("weight")  # which some libraries take away
        b, dtype, shape = held.get("bias", held), x.dtype, x.shape
        if not (type(W) is type(a) is type(up) is nn.Parameter and (b is None or type(b) is nn.Parameter)):
            return self.long(x)
        if not (W.dtype is a.dtype is up.dtype is dtype and dtype in WIDE and shape[-1] == d and len(shape) > 1):
            return self.long(x)
        if not (type(base) is nn.Linear and type(A) is type(B) is Linear and nn.Linear.forward is FORWARD):
            return self.long(x)
        if any(hooks) or any(EVERYWHERE) or any(map(is_not, map(get, tables, keys), wanted)):
            return self._anew(x)
        if (
            type(x) not in PLAIN
            or not x.is_cpu
            or forward_ad._current_level >= 0
            or _C._is_any_autocast_enabled()
            or _C._is_tracing()
            or "cpu" in choice.devices
            or peek_interpreter_stack() is not None
        ):
            return self.long(x)
        v = x.view(-1)
        if kept is None:
            y = W.mv(v) if b is None else torch.addmv(b, W, v)
            return y.addmv_(up, a.mv(v), alpha=scale).view(*shape[:-1], -1)
        m, gain, gained, marks, owners = kept
        now = (W._version, a._version, up._version, m._version, W.data_ptr(), a.data_ptr(), up.data_ptr(), m.data_ptr())
        if now != marks or (owner(W)._cdata, owner(a)._cdata, owner(up)._cdata, owner(m)._cdata) != owners:
            return self._anew(x)
        y = W.mv(v)
        y = y.mul_(gain) if b is None else torch.addcmul(b, y, gain)
        return y.addmv_(gained, a.mv(v)).view(*shape[:-1], -1)

    def _anew(self, x: Tensor) -> Tensor:
        """The long way, after which the next row looks at everything anew."""
        self._written = -1
        return self.long(x)

    def _note(self) -> tuple[Any, ...] | None:
        self.__dict__.update(_written=Adapter.written, _noted=None)
        p, modules = self.last, self.layer._modules
        if p.hot is None or self.extra is not None or not p.method.by_row(p):
            return None
        base, A, B, _, hooks = p.hot
        home = modules.get("lora_dropout")
        drop = None if home is None else home._modules.get(p.name)
        places: list[Place] = [(modules, "base_layer", base), (modules, "lora_dropout", home)]
        places += [
            place for key, module in (("lora_A", A), ("lora_B", B)) for place in standing(modules, key, p, module)
        ]
        places += [] if home is None else [(home._modules, p.name, drop)]
        places += [] if drop is None or type(drop) is nn.Identity else [(drop.__dict__, "training", False)]
        places += [(module.__dict__, "forward", None) for module in (base, A, B)]
        places += [(module.__dict__, "_forward_hooks", None) for module in (A, B)]
        kept = self._kept(places)
        if kept is None and type(self) is not Row:
            self._written = -1
            return None
        held = [module._parameters for module in (base, A, B)]
        tables, keys, wanted = zip(*places, strict=True)
        self._noted = (base.in_features, p.scaling, kept, base, A, B, *held, hooks, tables, keys, wanted)
        return self._noted

    def _kept(self, places: list[Place]) -> tuple[Any, ...] | None:
        """What is kept beside the tensors, and how these were when it was made; what it is kept of joins the places."""
        return None


class Gained(Row):
    """The same under a gain for each out-feature (DoRA), for as long as the one that evaluation keeps holds."""

    def _kept(self, places: list[Place]) -> tuple[Any, ...] | None:
        p, layer = self.last, self.layer
        if p.layer is not layer or still(p) is None:
            return None
        found, M = p.cache["kept"], p.lora_magnitude_vector
        places += standing(layer._modules, "lora_magnitude_vector", p, M)
        places += [(of._parameters, "weight", of._parameters.get("weight")) for of in (*p.hot[:3], M)]
        places += [(p.cache, "kept", found), (layer.__dict__, "training", False)]
        places += [(layer.__dict__, "_saved", layer.__dict__.get("_saved"))]
        tensors = [held for _, key, held in places if key == "weight"]
        then = {id(t): marks for t, *marks in found.tensors}
        seen = {(id(table), key) for table, key, _ in places}
        if then.keys() != {id(t) for t in tensors} or not seen >= {
            (id(table), key) for table, key, _ in found.places if table is not p.__dict__
        }:
            return None
        versions, addresses, owners = zip(*(then[id(t)] for t in tensors), strict=True)
        return (tensors[-1], *found.value[1:], versions + addresses, tuple(o.cdata for o in owners))


def standing(modules: dict[str, Any], key: str, p: Adapter, module: nn.Module) -> list[Place]:
    """Where the adapter's module `key` stands."""
    home = modules[key]
    return [(modules, key, home), (home._modules, p.name, module)]
