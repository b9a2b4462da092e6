"""`torch.compile(fullgraph=True)`: how many graphs, and whether switching, disabling or rescaling compiles again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Numbers, measure
from benchmarks.models import ALL_LINEAR, Llama
from benchmarks.subjects.wrapping import config, wrapped


class Counting:
    """A backend that runs the captured graph as it is and counts captures."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@measure(
    "torch.compile(fullgraph=True), 2 layers, two adapters of one shape",
    repeats=1,
    unit="",
    ceilings={
        "graphs": 1,
        "recompiled after set_adapter": 0,
        "recompiled after switching back": 0,
        "recompiled when disabled": 0,
        "recompiled when enabled again": 0,
        "recompiled after set_scale": 0,
        "recompiled after another set_scale": 0,
    },
)
def compiled() -> Iterator[Numbers]:
    """Captured graphs, counted in a backend of our own; training mode, so gradients are wanted."""
    while True:
        torch._dynamo.reset()
        yield captured()


def captured() -> Numbers:
    """Graphs after the first call, and how many more each change brings; the model runs uncompiled beside it."""
    backend, tokens = Counting(), torch.randint(0, 64, (2, 8))
    model = wrapped(Llama(2, 64, 128, 4, 64), target_modules=ALL_LINEAR, init_lora_weights=False)
    model.add_adapter("b", config(target_modules=ALL_LINEAR, init_lora_weights=False))
    fast: nn.Module = torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[assignment]
    changes: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "graphs": nullcontext,
        "recompiled after set_adapter": lambda: nullcontext(model.set_adapter("b")),
        "recompiled after switching back": lambda: nullcontext(model.set_adapter("default")),
        "recompiled when disabled": model.disable_adapter,
        "recompiled when enabled again": nullcontext,
        "recompiled after set_scale": lambda: nullcontext(rescale(model, 0.5)),
        "recompiled after another set_scale": lambda: nullcontext(rescale(model, 2.0)),
    }
    numbers: Numbers = {}
    gap = 0.0
    for label, change in changes.items():
        before = backend.graphs
        with change():
            gap = max(gap, (fast(tokens) - model(tokens)).abs().max().item())
        numbers[label] = backend.graphs - before
    return {**numbers, "largest gap to eager": gap}


def rescale(model: nn.Module, scale: float) -> None:
    """Give the first adapter this multiple of its own scaling, in every layer."""
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
