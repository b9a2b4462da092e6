"""Mixed batches: each row under an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.measure import Numbers, added, measure, smallest
from benchmarks.models import frozen, stack
from benchmarks.subjects.wrapping import config, wrapped

ROWS = 128
COUNTS = (2, 8, 32, 128)


def served(adapters: int, layers: int = 8, width: int = 256, **options: object) -> nn.Module:
    """A stack of adapted linear layers with so many adapters."""
    model = wrapped(stack(layers, width), init_lora_weights=False, **options)
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config(init_lora_weights=False, **options))
    return model.eval()


def names(adapters: int) -> list[str]:
    """The adapter of each row, in turns."""
    known = ["default", *(f"a{i}" for i in range(1, adapters))]
    return [known[i % adapters] for i in range(ROWS)]


@measure(
    "mixed batch, 128 rows of one token, 8 x Linear(256, 256), r=8",
    repeats=3,
    derive=added,
    limits={f"{n} adapters": 0.5 for n in COUNTS},
)
@torch.no_grad()
def mixed() -> Iterator[Numbers]:
    """Rows by adapters in turns, so that every segment has to be collected."""
    x = torch.randn(ROWS, 256)
    bare = frozen(stack(8, 256)).eval()
    models = {n: served(n) for n in COUNTS}
    while True:
        numbers = {}
        for n, model in models.items():
            run = lambda model=model, n=n: model(x, adapter_names=names(n))  # noqa: E731
            numbers["bare"] = min(numbers.get("bare", 1.0), smallest(lambda: bare(x), 5, 20))
            numbers[f"{n} adapters"] = smallest(run, 5, 20)
        yield numbers
