"""`torch.compile(fullgraph=True)`: how many graphs, and whether a switch of adapters compiles again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    ceilings={"graphs": 1, "recompiled after set_adapter": 0, "recompiled after switching back": 0},
)
def compiled() -> Iterator[Numbers]:
    """Captured graphs, counted in a backend of our own; training mode, so gradients are wanted."""
    while True:
        torch._dynamo.reset()
        yield captured()


def captured() -> Numbers:
    """Graphs after the first call, and how many more a switch there and back brings."""
    backend, tokens = Counting(), torch.randint(0, 64, (2, 8))
    model = wrapped(Llama(2, 64, 128, 4, 64), target_modules=ALL_LINEAR, init_lora_weights=False)
    model.add_adapter("b", config(target_modules=ALL_LINEAR, init_lora_weights=False))
    fast: nn.Module = torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[assignment]
    gaps, counts = [], []
    for name in ("default", "b", "default"):
        model.set_adapter(name)
        gaps.append((fast(tokens) - model(tokens)).abs().max().item())
        counts.append(backend.graphs)
    return {
        "graphs": counts[0],
        "recompiled after set_adapter": counts[1] - counts[0],
        "recompiled after switching back": counts[2] - counts[1],
        "largest gap to eager": max(gaps),
    }
