"""Fused experts in a packed form: their module reads its weights itself, with kernels that know only that form.

While some of the weights are numbers, all of the module is computed from numbers, expert by expert, as its dense
counterpart does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import storage
from ..core.storage import Payload
from .scaled import Scaled

Weight = Callable[[str], Tensor]


class Numbers:
    """Stands as the forward of a module of experts while some of its weights are numbers."""

    def __init__(self, module: nn.Module, lent: Mapping[str, Tensor]):
        self.module, self.lent = module, dict(lent)

    def weight(self, name: str) -> Tensor:
        """(E, O, I)."""
        found = self.lent.get(name)
        return storage.of(self.module, name).read(self.module, name) if found is None else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind: Any = storage.by_class(type(self.module))
        return kind.dense_forward(self.module, self.weight, *args, **kwargs)


class Experts(Scaled):
    """Weights (E, O, I) of a module of experts. A subclass states where they lie, and `gated`."""

    weights: ClassVar[tuple[str, ...]] = ("gate_up_proj", "up_proj", "down_proj")

    def holds(self, module: nn.Module, name: str) -> bool:
        return name in module._parameters or name in module._buffers

    def gated(self, module: Any, h: Tensor) -> Tensor:
        """What an expert makes of its first product."""
        raise NotImplementedError

    def dense_forward(self, m: Any, weight: Weight, hidden_states: Tensor, *routes: Tensor, **named: Tensor) -> Tensor:
        """The sum over the chosen experts of weight times down(gated(up(x))).

        Arguments:
            m: the module.
            weight: the name of a weight -> its numbers.
            hidden_states: (tokens, H).
            routes, named: the experts of each token, (tokens, k), and their weights; ids outside of those that m has
                are skipped.
        """
        index, scores = (*routes, *named.values())
        first = "gate_up_proj" if self.holds(m, "gate_up_proj") else "up_proj"
        up, down = weight(first), weight("down_proj")
        up_bias, down_bias = (getattr(m, f"{name}_bias", None) for name in (first, "down_proj"))
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, scores.dtype))
        index, scores = index.reshape(len(x), -1), scores.reshape(len(x), -1)
        for expert in index.unique().tolist():
            if not 0 <= expert < len(up):
                continue
            token, place_of = torch.where(index == expert)
            h = F.linear(x[token].to(up.dtype), up[expert], _of(up_bias, expert, up))
            y = F.linear(self.gated(m, h).to(down.dtype), down[expert], _of(down_bias, expert, down))
            out = out.index_add(0, token, (y * scores[token, place_of, None]).to(out.dtype))
        return out.to(hidden_states.dtype).view_as(hidden_states)

    def run(self, module: nn.Module, values: Mapping[str, Tensor], call: Callable[[], Any]) -> Any:
        d, slot = module.__dict__, _slot(module)
        before = d.get(slot)
        d[slot] = Numbers(module, {**(before.lent if isinstance(before, Numbers) else {}), **values})
        try:
            return call()
        finally:
            _set(d, slot, before)

    def keep_dense(self, module: nn.Module, name: str, value: Tensor) -> bool:
        self.put(module, name, {"dense": value})
        return True

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        d, slot = module.__dict__, _slot(module)
        self.lay(module, name, payload)
        dense = [n for n in self.weights if self.holds(module, n) and "dense" in self.take(module, n)]
        if dense:
            d[slot] = Numbers(module, {})
        elif isinstance(d.get(slot), Numbers):
            _set(d, slot, None)

    def lay(self, module: nn.Module, name: str, payload: Payload) -> None:
        """Put a payload's tensors where they lie in the module."""
        raise NotImplementedError


def _of(bias: Tensor | None, expert: int, W: Tensor) -> Tensor | None:
    return None if bias is None else bias[expert].to(W.dtype)


def _slot(module: nn.Module) -> str:
    """Where a module keeps its own forward, which accelerate may have wrapped."""
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def _set(d: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        d.pop(key, None)
    else:
        d[key] = value
