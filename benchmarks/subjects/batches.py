"""Mixed batches, each row under an adapter of its own, and fused experts, each token under a few of many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Numbers, added, measure, turns
from benchmarks.models import ALL_LINEAR, Llama, frozen, stack
from benchmarks.subjects.steps import step
from benchmarks.subjects.wrapping import config, wrapped

ROWS = 128
COUNTS = (2, 8, 32, 128)


def served(adapters: int, layers: int = 8, width: int = 256, **options: object) -> nn.Module:
    """A stack of adapted linear layers with so many adapters."""
    return under(stack(layers, width), adapters, **options)


def under(model: nn.Module, adapters: int, **options: object) -> nn.Module:
    """A model with so many adapters."""
    model = wrapped(model, init_lora_weights=False, **options)
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config(init_lora_weights=False, **options))
    return model.eval()


def names(adapters: int) -> list[str]:
    """The adapter of each row, in turns."""
    known = ["default", *(f"a{i}" for i in range(1, adapters))]
    return [known[i % adapters] for i in range(ROWS)]


def beside(bare: Callable[[], object], runs: dict[int, Callable[[], object]], times: int) -> Iterator[Numbers]:
    """Repetitions of what runs for each number of adapters."""
    while True:
        yield turns(bare, {f"{n} adapters": run for n, run in runs.items()}, times)


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
    models = {n: (served(n), names(n)) for n in COUNTS}
    runs = {n: partial(m, x, adapter_names=who) for n, (m, who) in models.items()}
    yield from beside(partial(bare, x), runs, 100)


@measure("mixed batch in training, 128 rows of one token, 8 x Linear(256, 256), r=8", repeats=3, derive=added)
def mixed_train() -> Iterator[Numbers]:
    """Gradients of the input and of every adapter, thrown away."""
    x = torch.randn(ROWS, 256, requires_grad=True)
    bare = step(frozen(stack(8, 256)).eval(), x)
    steps = {n: learning(served(n), x, names(n)) for n in COUNTS}
    yield from beside(bare, steps, 25)


def learning(model: nn.Module, x: Tensor, who: list[str]) -> Callable[[], None]:
    """A step in which all adapters learn."""
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    run = step(lambda z: model(z, adapter_names=who), x)

    def whole() -> None:
        run()
        model.zero_grad(set_to_none=True)

    return whole


@measure("mixed batch, 128 rows of one token, 2 Llama blocks of 256, all-linear r=8", repeats=2, derive=added)
@torch.no_grad()
def mixed_block() -> Iterator[Numbers]:
    """Attention, norms and the head beside the adapted layers, which share their inputs in part."""
    x, shape = torch.randn(ROWS, 1, 256), (2, 256, 688, 4, 256)
    bare = frozen(Llama(*shape)).eval()
    models = {n: (under(Llama(*shape), n, target_modules=ALL_LINEAR), names(n)) for n in COUNTS}
    runs = {n: partial(m, x, adapter_names=who) for n, (m, who) in models.items()}
    yield from beside(partial(bare, x), runs, 50)


class Experts(nn.Module):
    """Fused experts, gate and up projections stacked as in transformers 5; each token goes to those it is told."""

    def __init__(self, count: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, hidden) / 16)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, inner) / 16)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in chosen.unique():
            token, _ = torch.where(chosen == expert)
            gate, up = F.linear(x[token], self.gate_up_proj[expert]).chunk(2, -1)
            y.index_add_(0, token, F.linear(F.silu(gate) * up, self.down_proj[expert]))
        return y


class Routed(nn.Module):
    """A model of nothing but experts."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.experts = Experts(*sizes)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return self.experts(x, chosen)


@measure("fused experts, one token, 2 of 32 experts, 512 / 1024, r=8", repeats=3, derive=added, limits={"adapted": 0.1})
@torch.no_grad()
def experts() -> Iterator[Numbers]:
    """Only the experts that are chosen are computed."""
    x, chosen, sizes = torch.randn(1, 512), torch.tensor([[3, 17]]), (32, 512, 1024)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    bare = frozen(Routed(*sizes)).eval()
    model = wrapped(Routed(*sizes), target_modules=[], target_parameters=parameters, init_lora_weights=False).eval()
    while True:
        yield turns(partial(bare, x, chosen), {"adapted": partial(model, x, chosen)}, 50)
