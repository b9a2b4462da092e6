"""Training steps that run again or are recorded: gradient checkpointing in both forms, and no waiting for a device.

A CUDA graph records kernels once and replays them, so that, after a first step, a forward or backward pass may neither
read a number on the host nor bring one from there. The meta device stands in for the accelerator: its tensors have no
numbers that could be read. A mixed batch is no such step: its rows are sorted by `adapter_names` anew at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from conformance.layouts import LAYOUTS, Around, Layout
from conformance.rows import FEW, METHODS, adapted, cells, close, given
from peft import LoraConfig, get_peft_model

DROPOUT = {"lora": {"lora_dropout": 0.3}, "dora": {"lora_dropout": 0.3}, "vera": {"vera_dropout": 0.3}}
KINDS = ("conv-2d", "embedding", "attention-packed", "parameter-3-D")


# ---- gradient checkpointing ------------------------------------------------------------------------------------


class Again(Around):
    """Runs its layer again in the backward pass, in one of torch's two ways, or not at all."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.reentrant is None else checkpoint(self.layer, x, use_reentrant=self.reentrant)


def again(name: str) -> Layout:
    """A layout whose layer is checkpointed."""
    layout = LAYOUTS[name]
    return replace(layout, build=lambda: Again(layout.build().layer))


def gradients(model: nn.Module, x: Tensor, reentrant: bool | None, **told: Any) -> list[Tensor]:
    """Of all trained tensors and of x, in one training step from a given random state."""
    model.get_base_model().reentrant = reentrant
    torch.manual_seed(3)
    held = [p for p in model.parameters() if p.requires_grad]
    if x.is_floating_point():
        x = x.clone().requires_grad_()
        held.append(x)
    for t in held:
        t.grad = None
    model(x, **told).tanh().square().sum().backward()  # rotations change no sum of squares
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in held]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method, name", [c for c in cells() if c[1] == "linear-3-D"] + [("ia3", "conv-2d")])
def test_a_layer_that_is_run_again_has_the_same_gradients(method: str, name: str, reentrant: bool) -> None:
    layout = again(name)
    model, x = adapted(method, layout, **DROPOUT.get(method, {})).train(), layout.x()
    wanted = gradients(model, x, None)
    for found, grad in zip(gradients(model, x, reentrant), wanted, strict=True):
        close(found, grad, 1e-6)
    assert any(g.any() for g in wanted)


class Chosen(nn.Module):
    """Runs its layer again in the backward pass but for the products, whose results it keeps."""

    products = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "mv", "_to_copy"))
    reentrant: bool | None = None

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return torch.tanh(self.layer(x))
        kept = partial(create_selective_checkpoint_contexts, list(self.products))
        return checkpoint(lambda x: torch.tanh(self.layer(x)), x, use_reentrant=self.reentrant, context_fn=kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("method", [m for m, name in cells() if name == "linear-3-D"])
def test_selective_checkpointing_finds_the_results_that_it_kept(method: str, rows: int, dtype: torch.dtype) -> None:
    """A result that was changed where it lies is refused by torch, or taken for the operation's if it cannot see it."""
    layout = replace(LAYOUTS["linear-3-D"], build=lambda: Chosen(nn.Linear(6, 8)), shape=(4, rows, 6))
    model, x = adapted(method, layout, dtype, **DROPOUT.get(method, {})).train(), layout.x(dtype)
    wanted = gradients(model, x, None)
    for found, grad in zip(gradients(model, x, False), wanted, strict=True):
        close(found, grad, 1e-6 if dtype is torch.float32 else 3e-2)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("names", [["one", "__base__", "two", "two"], ["one", "one", "two", "two"]])
def test_selective_checkpointing_of_mixed_batches(method: str, names: list[str]) -> None:
    layout = replace(LAYOUTS["linear-3-D"], build=lambda: Chosen(nn.Linear(6, 8)))
    model, x = adapted(method, layout, names=("one", "two")).train(), layout.x()
    model.base_model.set_requires_grad(["one", "two"])
    wanted = gradients(model, x, None, adapter_names=names)
    for found, grad in zip(gradients(model, x, False, adapter_names=names), wanted, strict=True):
        close(found, grad, 1e-6)


@pytest.mark.parametrize("method, name", [("lora", n) for n in (*KINDS, "conv-2d-grouped")] + [("dora", "embedding")])
def test_other_layers_are_run_again_by_the_form_that_needs_no_gradient_of_the_input(method: str, name: str) -> None:
    if name.startswith("attention"):
        model = get_peft_model(Seen(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)).train()
        x = LAYOUTS[name].x()
    else:
        layout = again(name)
        rate = {} if name.startswith("parameter") else DROPOUT[method]
        model, x = adapted(method, layout, **rate).train(), layout.x()
    wanted = gradients(model, x, None)
    for found, grad in zip(gradients(model, x, False), wanted, strict=True):
        close(found, grad, 1e-6)


class Seen(nn.Module):
    """Attention of a sequence to itself, checkpointed."""

    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.layer(x, x, x, need_weights=False)[0]
        return checkpoint(self.layer, x, x, x, need_weights=False, use_reentrant=self.reentrant)[0]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", [m for m in ("lora", "dora", "ia3", "oft", "vera")])
@pytest.mark.parametrize("training", [True, False])
def test_a_mixed_batch_is_run_again_with_each_rows_adapter(method: str, reentrant: bool, training: bool) -> None:
    layout = again("linear-3-D")
    model, x = adapted(method, layout, names=("one", "two")).train(training), layout.x()
    model.base_model.set_requires_grad(["one", "two"])
    names = ["two", "__base__", "one", "two"]
    wanted = gradients(model, x, None, adapter_names=names)
    for found, grad in zip(gradients(model, x, reentrant, adapter_names=names), wanted, strict=True):
        close(found, grad, 1e-6)
    assert all(g.any() for g in wanted)


def test_checkpoints_in_checkpoints_and_steps_in_another_order_keep_their_batches_apart() -> None:
    layout = again("linear-3-D")
    model, x = adapted("lora", layout, names=("one", "two")), layout.x()
    model.base_model.set_requires_grad(["one", "two"])
    held = [p for p in model.parameters() if p.requires_grad]
    batches: list[dict[str, Any]] = [
        {"adapter_names": ["one"] * 4},
        {"adapter_names": ["two", "one", "one", "two"]},
        {},
    ]

    def run(reentrant: bool | None, order: Sequence[int]) -> list[list[Tensor]]:
        model.get_base_model().reentrant = reentrant
        ys = [model(x, **names) for names in batches]
        found = {i: torch.autograd.grad(ys[i].square().sum(), held, allow_unused=True) for i in order}
        return [
            [torch.zeros_like(p) if g is None else g for g, p in zip(found[i], held, strict=True)] for i in range(3)
        ]

    wanted = run(None, range(3))
    for order in permutations(range(3)):
        for found, grads in zip(run(False, order), wanted, strict=True):
            for one, two in zip(found, grads, strict=True):
                close(one, two, 1e-6)


# ---- nothing waits for the device --------------------------------------------------------------------------------

aten = torch.ops.aten
MASKS = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}


class OnDevice(TorchDispatchMode):
    """Refuses what a recorded graph cannot hold: reading numbers, sizes that they decide, tensors of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MASKS:
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), f"{func} of a mask"
        else:
            assert torch.Tag.dynamic_output_shape not in func.tags, f"{func} has a size that numbers decide"
        assert torch.Tag.data_dependent_output not in func.tags, f"{func} reads a number"
        out = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.dim()]
        assert all(t.is_meta for t in found), f"{func} of a tensor on the host"
        return out


class NoConstants(TorchDispatchMode):
    """Refuses tensors that are made of Python's numbers, which a device would have to fetch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not aten.lift_fresh.default, "a tensor is made of numbers"
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, x: Tensor, **told: Any) -> None:
    """A training step, a step of evaluation with gradients, and one without."""
    held = [p for p in model.parameters() if p.requires_grad]
    if x.is_floating_point():
        x = x.detach().requires_grad_()
        held.append(x)
    for mode in (True, False):
        y = model.train(mode)(x, **told)
        torch.autograd.grad(y.square().sum(), held, allow_unused=True)
    with torch.no_grad():
        model(x, **told)


def reads_by_task(method: str, name: str) -> bool:
    """A module that reads one weight for all rows runs once for each task of a batch, whose ids are looked at."""
    return bool(METHODS[method].tasks) and name.split("-")[0] in ("attention", "parameter")


RECORDED = [c for c in cells() if (c[1] == "linear-3-D" or (c[1] in KINDS and c[0] in FEW)) and not reads_by_task(*c)]


@pytest.mark.parametrize("method, name", RECORDED)
def test_no_step_waits_for_the_device_or_brings_numbers_there(method: str, name: str) -> None:
    layout = LAYOUTS[name]
    model, x, told = (
        adapted(method, layout, **DROPOUT.get(method, {}) if "linear" in name else {}),
        layout.x(),
        given(method),
    )
    model._forward_pre_hooks.clear()
    step(model, x, **told)
    with NoConstants():
        step(model, x, **told)
    model, x, told = model.to("meta"), x.to("meta"), {key: value.to("meta") for key, value in told.items()}
    step(model, x, **told)
    with OnDevice():
        step(model, x, **told)


def test_the_guards_find_what_they_forbid() -> None:
    x = torch.ones(3, device="meta")
    for bad in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: x.cpu(), lambda: torch.ones(2)):
        with OnDevice(), pytest.raises((AssertionError, NotImplementedError)):
            bad()
    with NoConstants(), pytest.raises(AssertionError, match="made of numbers"):
        torch.tensor([1.0])
