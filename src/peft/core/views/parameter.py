"""Weights that their module reads instead of calling a layer: single parameters, fused experts, attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeftWarning
from .. import storage
from ..onload import kept_here
from .linear import Layer, LinearView, Pair
from .make import diagonal, linear_module


class ParameterView(LinearView):
    """A parameter of a module that is no layer: (O, I), or experts (E, O, I), stored (E, I, O) if `is_transposed`."""

    label = "ParamWrapper"
    activations = False
    dense = False
    drops = True
    sees_inputs = False

    def __init__(self, name: str, bias_name: str | None = None):
        self.name, self.bias_name = name, bias_name or ""

    def shape(self, m: Layer) -> Pair:
        shape = storage.of(m, self.name).shape(m, self.name)
        if len(shape) not in (2, 3):
            raise ValueError(
                f"The parameter {self.name!r} has {len(shape)} dimensions {shape}; only matrices (out, in) and stacks "
                "of matrices (experts, out, in) can be adapted."
            )
        return (shape[0], shape[2], shape[1]) if self._transposed(m, len(shape)) else shape

    why = "a parameter without a bias beside it: the product that one would be added to is its module's own"

    def own_forward(self, m: Layer) -> bool:
        return False  # whatever the module does with its weight, it does with a new one

    def matrix(self, m: Layer, raw: Tensor) -> Tensor:
        return raw.mT if self._transposed(m, raw.dim()) else raw

    def raw(self, m: Layer, W: Tensor) -> Tensor:
        return W.mT if self._transposed(m, W.dim()) else W

    def _transposed(self, m: Layer, dims: int) -> bool:
        return dims == 3 and bool(getattr(m, "is_transposed", False))

    def out_axis(self, m: Layer) -> int:
        dims = len(self.shape(m))
        return dims - (1 if self._transposed(m, dims) else 2)

    def bias(self, m: Layer) -> Tensor | None:
        return super().bias(m) if self.bias_name else None

    def down(self, m: Layer, r: int, blocks: int = 1, **kwargs: Any) -> nn.Module:
        *experts, _, inp = self.shape(m)
        return linear_module(inp // blocks, r * math.prod(experts), **kwargs)

    def up(self, m: Layer, r: int, bias: bool = False, blocks: int = 1, **kwargs: Any) -> nn.Module:
        *experts, out, _ = self.shape(m)
        if bias and not self.bias_name:
            raise ValueError(f"lora_bias=True has no meaning for {self.name!r}, {self.why}. Set lora_bias=False.")
        up = linear_module(r // blocks * math.prod(experts), out, bias, **kwargs)
        if bias and experts:
            up._parameters["bias"] = nn.Parameter(torch.empty(*experts, out, **kwargs))  # each has its own
        return up

    def A(self, m: Layer, held: Tensor, blocks: int = 1) -> Tensor:
        # checkpoints pack A as (E r, I) and B as (O, r E)
        *experts, _, _ = self.shape(m)
        return diagonal(held.unflatten(0, (*experts, -1)) if experts else held, blocks)

    def B(self, m: Layer, held: Tensor, blocks: int = 1) -> Tensor:
        *experts, _, _ = self.shape(m)
        return diagonal(held.unflatten(1, (-1, *experts)).permute(2, 0, 1) if experts else held, blocks)

    def held(self, m: Layer, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return (A, B) if A.dim() == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))

    def linear(self, m: Layer, x: Tensor, W: Tensor) -> Tensor:
        raise AssertionError("a parameter is put in place, it is not applied")

    def run(
        self, m: Layer, values: Mapping[str, Tensor], outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run `outer`, which is m or stands around it, with tensors in place of m's parameters."""
        if (kind := storage.named(m, self.name)) is not None:
            weight = {self.name: values[self.name]}
            beside = {name: value for name, value in values.items() if name != self.name}
            return kind.run(m, weight, lambda: self._in_place(m, beside, outer, args, kwargs))
        if "_hf_hook" in m.__dict__:
            with kept_here(m):
                return self._in_place(m, values, outer, args, kwargs)
        return self._in_place(m, values, outer, args, kwargs)

    def _in_place(
        self, m: Layer, values: Mapping[str, Tensor], outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        held = m._parameters
        if not values.keys() <= held.keys():  # copies for data parallelism, and FSDP1, have attributes
            held = m.__dict__
            refuse_computed(m, values)
        before = {name: held[name] for name in values}
        try:
            held.update(values)
            return outer(*args, **kwargs)
        finally:
            held.update(before)


def bias_beside(m: nn.Module, name: str) -> str | None:
    """The parameter that a module adds to its product with another one, as the two names and shapes say.

    That is "gate_up_proj_bias" (E, O) beside "gate_up_proj", or "bias" (O,) beside "weight".
    """
    names = (n for n in (f"{name}_bias", name.replace("weight", "bias")) if n != name)
    beside = [(n, b.shape) for n in names if (b := m._parameters.get(n)) is not None]
    return next((n for n, shape in beside if shape == ParameterView(name).shape(m)[:-1]), None)


def refuse_computed(m: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if a module makes one of these tensors at each call, in place of what is put there."""
    computed = [n for n in names if any(f"{n}_{kind}" in m._parameters for kind in ("orig", "g", "v"))]
    computed += [n for n in names if n in getattr(m, "parametrizations", ())]
    if computed:
        raise ValueError(
            f"The {computed[0]} of a {type(m).__name__} that adapters change in its place (target_parameters) is now "
            "computed at each call (pruning, weight norm or a parametrization), so they would have no effect. Make it "
            "permanent, with torch.nn.utils.prune.remove or its like, or name the module in target_modules."
        )


INPUTS = ("query", "key", "value")


class AttentionView(ParameterView):
    """nn.MultiheadAttention: the packed in-projection (3 E, E), or one of the separate ones.

    The out-projection is a layer of its own.
    """

    drops = False
    read_children = ("out_proj",)
    sees_inputs = True
    why = (
        "one of the separate query, key and value weights of an nn.MultiheadAttention with kdim or vdim, whose biases "
        "are one packed parameter"
    )
    masks = (5, "attn_mask")
    methods = ("merge_masks",)

    def __init__(self, name: str = "in_proj_weight") -> None:
        packed = name == "in_proj_weight"
        super().__init__(name, "in_proj_bias" if packed else None)
        self.label = "MultiheadAttention" if packed else "ParamWrapper"

    def vectors(self, m: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        given = dict(zip(INPUTS, args, strict=False)) | kwargs
        names = [
            i for i in INPUTS if self.name == f"{i[0]}_proj_weight"
        ] or INPUTS  # else packed, a third of W for each
        return [given[i].flatten(0, -2) for i in names]

    def child_vectors(self, m: Layer, child: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        mine = m._modules[child]
        n, like = mine.in_features, mine.weight
        seen_through = linear_module(n, n, True, dtype=like.dtype, device=like.device)
        nn.init.eye_(seen_through.weight)
        nn.init.zeros_(seen_through.bias)
        try:
            m._modules[child] = seen_through
            return [m.forward(*args, **kwargs)[0].flatten(0, -2)]
        finally:
            m._modules[child] = mine

    def parts(self, m: Layer) -> tuple[str, ...]:
        return () if m._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")

    def check_dropout(self, path: str, argument: str) -> None:
        path = path.removesuffix(f".{self.name}")
        warnings.warn(
            f"{argument} has no effect on {path!r}: attention reads its weights, so the adapter has no input of its "
            f"own. Set {argument}=0 for it with module_config to silence this.",
            PeftWarning,
            stacklevel=2,
        )
