"""A single row through LoRA in evaluation, as in decoding: one function from the layer to the products.

A large matrix leaves nothing of the layers' state in the caches, and each object that is looked at costs as much as
many instructions. So what was found when the layer's state changed lies in one tuple, and one function asks whether it
still holds: the modules in their places, without hooks or patches, and torch running operations as they are written.
Where it does not, and for everything but a single row, `LoRA.forward` decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.autograd import forward_ad

from ...core.direct import EVERYWHERE, FORWARD
from ...core.stack import Adapter, Stack
from ...core.views import Linear
from ...kernels import choice
from ...kernels.thin import PLAIN, WIDE

peek_interpreter_stack = _C._functorch.peek_interpreter_stack
HOMES = ("lora_A", "lora_B", "lora_dropout")


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
        d, name, scale, m, base, A, B, home_A, home_B, home_drop, in_A, in_B, drops, of_base, of_A, of_B, *_ = noted
        held, held_A, held_B, hooks = noted[-4:]
        W, a, up = held.get("weight"), held_A.get("weight"), held_B.get("weight")  # which some libraries take away
        b, dtype, shape = held.get("bias", held), x.dtype, x.shape
        if not (type(W) is type(a) is type(up) is nn.Parameter and (b is None or type(b) is nn.Parameter)):
            return self.long(x)
        if not (W.dtype is a.dtype is up.dtype is dtype and dtype in WIDE and shape[-1] == d and len(shape) > 1):
            return self.long(x)
        if not (type(base) is nn.Linear and type(A) is type(B) is Linear and nn.Linear.forward is FORWARD):
            return self.long(x)
        if m["base_layer"] is not base or m["lora_A"] is not home_A or m["lora_B"] is not home_B:
            return self.long(x)
        if in_A[name] is not A or in_B[name] is not B or m.get("lora_dropout") is not home_drop:
            return self.long(x)
        if drops is not None and drops[name].training and type(drops[name]) is not nn.Identity:
            return self.long(x)
        if "forward" in of_base or "forward" in of_A or "forward" in of_B or any(hooks) or any(EVERYWHERE):
            return self.long(x)
        if "_forward_hooks" in of_A or "_forward_hooks" in of_B or "cpu" in choice.devices or _C._is_tracing():
            return self.long(x)
        if (
            type(x) not in PLAIN
            or not x.is_cpu
            or forward_ad._current_level >= 0
            or _C._is_any_autocast_enabled()
            or peek_interpreter_stack() is not None
        ):
            return self.long(x)
        v = x.view(-1)
        y = W.mv(v) if b is None else torch.addmv(b, W, v)
        return y.addmv_(up, a.mv(v), alpha=scale).view(*shape[:-1], -1)

    def _note(self) -> tuple[Any, ...] | None:
        self.__dict__.update(_written=Adapter.written, _noted=None)
        p, m = self.last, self.layer._modules
        if p.hot is None or self.extra is not None or not p.method.by_row(p):
            return None
        base, A, B, _, hooks = p.hot
        homes = [m.get(key) for key in HOMES]
        inside = [None if home is None else home._modules for home in homes]
        own = [module.__dict__ for module in (base, A, B)] + [module._parameters for module in (base, A, B)]
        self._noted = (base.in_features, p.name, p.scaling, m, base, A, B, *homes, *inside, *own, hooks)
        return self._noted
