"""The models that the tests are about, and what they should compute.

`expected` runs a fresh plain model with the weights that the rows' formulas (`oracles`) give. Nothing of it is taken
from the library, and it is differentiable.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft import PeftModel, get_peft_model
from peft.core.layer import BaseTunerLayer
from peft.core.layer import tuner_layers as hosts

from .layouts import LAYOUTS, Layout
from .oracles import METHODS
from .oracles.row import Row

SEVERAL = tuple(name for name, row in METHODS.items() if not row.alone)  # two of them can be active
FEW = tuple(name for name, row in METHODS.items() if row.few)  # where first values do not matter


def tuner_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """(path, layer) of every adapted layer."""
    return [(path, layer) for path, layer in hosts(model) if isinstance(layer, BaseTunerLayer)]


# Sums of at most a few dozen products in another order: some units in the last place of the largest term. Half
# precision rounds each intermediate result once more, and the two sides round at different places.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def forbidden(method: str, layout: Layout) -> str | None:
    """Why a method cannot be built on a layout: the words that its error must hold."""
    return METHODS[method].forbidden(layout)


def mergeable(method: str, layout: Layout) -> bool:
    """Whether the layer can hold the method's W'."""
    return METHODS[method].merges and (METHODS[method].grouped or not layout.grouped)


def cells(methods: Any = METHODS, only: Any = None, merged: bool = False) -> list[tuple[str, str]]:
    """(method, layout) of every pair that can be built; `only` chooses among layouts, `merged` those that merge."""
    return [
        (method, name)
        for name, layout in LAYOUTS.items()
        for method in methods
        if forbidden(method, layout) is None
        and (only is None or only(layout))
        and (not merged or mergeable(method, layout))
    ]


def config(method: str, layout: Layout, **changes: Any) -> Any:
    row = METHODS[method]
    known = {f.name for f in dataclasses.fields(row.config)}
    targets = {k: v for k, v in layout.targets.items() if k in known}
    return row.config(**{**row.fields, **row.changes.get(layout.kind, {}), **targets, **changes})


def adapted(
    method: str,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = ("default",),
    **changes: Any,
) -> PeftModel:
    """A model with trained-looking adapters of these names, of which the first is active."""
    wrapped = get_peft_model(layout.model(dtype), config(method, layout, **changes), adapter_name=names[0])
    model = told(wrapped, method, layout)
    for name in names[1:]:
        model.add_adapter(name, config(method, layout, **changes))
    model.__dict__["noise"] = METHODS[method].noise
    for i, name in enumerate(names):
        train(model, name, seed=i)
    return model.eval()


def given(method: str, samples: slice = slice(None)) -> dict[str, Any]:
    """What a model must be told of these samples of a layout's input."""
    tasks = METHODS[method].tasks
    return {"task_ids": torch.tensor(tasks[samples])} if tasks else {}


class Telling:
    """Stands before a model's forward, and tells it what it must know of the samples, unless the caller does."""

    def __init__(self, method: str, batched: bool):
        self.method, self.batched = method, batched

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        samples = slice(len(args[0]) if self.batched else 1)
        return args, {**given(self.method, samples), **kwargs}


def told(model: PeftModel, method: str, layout: Layout) -> PeftModel:
    """The model, which from now on knows the tasks of a layout's samples."""
    if METHODS[method].tasks:
        model.register_forward_pre_hook(Telling(method, layout.batched), with_kwargs=True)
    return model


@torch.no_grad()
def train(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    """Give every tensor of an adapter other values, as training would; the first ones are remembered."""
    generator = torch.Generator().manual_seed(seed)
    scale = getattr(model, "noise", 1 / 3)
    for _, layer in tuner_layers(model):
        first = layer.__dict__.setdefault("first", {})
        first[name] = {slot.live: slot.tensor.clone() for slot in layer.slots(name)}
        for slot in layer.slots(name):
            if not isinstance(slot.tensor, nn.Parameter):
                continue  # buffers are not trained
            noise = torch.randn(slot.tensor.shape, generator=generator).to(slot.tensor)
            slot.tensor.copy_(
                slot.tensor * (1 + 0.2 * noise) if "magnitude" in slot.live else slot.tensor + noise * scale
            )


# ---- what should come out ------------------------------------------------------------------------------------


def expected(
    model: PeftModel,
    method: str,
    layout: Layout,
    x: Tensor,
    names: tuple[str, ...] = ("default",),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The output by the formulas in double precision, differentiable in the adapters' tensors and in x."""
    row = METHODS[method]
    if row.of_input is not None:
        row = replace(row, weight=row.of_input(x))
    if row.of_task is None:
        return by_formulas(model, row, layout, x, names, dtype)
    parts = x.split(1) if layout.batched else [x]
    weights = map(row.of_task, row.tasks)
    return torch.cat(
        [
            by_formulas(model, replace(row, weight=w), layout, part, names, dtype)
            for w, part in zip(weights, parts, strict=layout.batched)
        ]
    )


def by_formulas(
    model: PeftModel, row: Row, layout: Layout, x: Tensor, names: tuple[str, ...], dtype: torch.dtype
) -> Tensor:
    """`expected` where all samples have the same weight."""
    plain = layout.plain(dtype).double()
    values: dict[str, Tensor] = {}
    for path, layer in tuner_layers(model.base_model.model):
        where = path.replace("base_layer.", "").removesuffix("base_layer").rstrip(".")
        module, prefix = plain.get_submodule(where), f"{where}." if where else ""
        if row.values is not None:
            values.update({prefix + key: value for key, value in row.values(layer, names[-1]).items()})
            continue
        attr, b_name = names_of(layer)
        W, b = getattr(module, attr), getattr(module, b_name, None)
        original = W
        for name in names:
            W = row.weight(layer, name, W, original)
            b = b if row.bias is None else row.bias(layer, name, b)
        values[prefix + attr] = W
        if layout.grouped and W.shape != original.shape:
            module.groups, module.weight = 1, nn.Parameter(W.detach())
        if row.bias is not None and b is not None and layout.kind == "embedding":  # every token's row holds it
            values[prefix + attr] = W + b / float(getattr(module, "embed_scale", 1.0))
        elif row.bias is not None and b is not None:
            if getattr(module, b_name, None) is None:
                setattr(module, b_name, nn.Parameter(torch.zeros_like(b)))
            values[prefix + b_name] = b
    return within_norm(plain, values, x if layout.tokens else x.double()).to(
        torch.float32 if layout.tokens else x.dtype
    )


def within_norm(plain: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """The plain model under these weights; torch's `max_norm` would write into them, so it is applied here."""
    layer = getattr(plain, "layer", None)
    limit = layer.max_norm if isinstance(layer, nn.Embedding) else None
    if limit is not None:
        layer.max_norm = None
    y = torch.func.functional_call(plain, values, (x,))
    if limit is None:
        return y
    size = y.detach().norm(dim=-1, keepdim=True)
    return y * torch.where(size > limit, limit / (size + 1e-7), 1.0)


def names_of(layer: BaseTunerLayer) -> tuple[str, str]:
    """The attributes that hold the adapted weight and its bias."""
    if layer.parameter_name is not None:
        return layer.parameter_name, "bias"
    attention = isinstance(layer.get_base_layer(), nn.MultiheadAttention)
    return ("in_proj_weight", "in_proj_bias") if attention else ("weight", "bias")


# ---- comparing -----------------------------------------------------------------------------------------------


def close(found: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    """Equal up to rounding, relative to the largest value."""
    limit = TOLERANCE[found.dtype] if tolerance is None else tolerance
    assert found.shape == wanted.shape, f"{tuple(found.shape)} is not {tuple(wanted.shape)}"
    assert found.dtype is wanted.dtype, f"{found.dtype} is not {wanted.dtype}"
    size = wanted.double().abs().max().clamp_min(1e-30)
    error = ((found.double() - wanted.double()).abs().max() / size).item()
    assert error <= limit, f"relative error {error:.2e} is above {limit:.0e}"


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal to the bit."""
    assert found.dtype is wanted.dtype
    assert torch.equal(found, wanted), f"differs by {(found.double() - wanted.double()).abs().max().item():.2e}"
