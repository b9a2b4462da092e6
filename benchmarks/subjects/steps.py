"""Running an adapted model: decoding one token, and training steps, each against the bare frozen model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Numbers, added, calls, measure, turns
from benchmarks.models import ALL_LINEAR, Llama, frozen, stack
from benchmarks.subjects.wrapping import wrapped


@measure(
    "decode one token, 24 layers of hidden 256, all-linear r=8",
    repeats=5,
    derive=added,
    limits={"adapted: added to bare": 0.5, "disabled: added to bare": 0.5},
    ceilings={"adapted: over bare|x": 1.15},
)
@torch.no_grad()
def decode() -> Iterator[Numbers]:
    """168 adapted layers at the size where the interpreter decides."""
    token = torch.tensor([[1]])
    bare = frozen(Llama(24, 256, 688, 4)).eval()
    adapted = wrapped(Llama(24, 256, 688, 4), target_modules=ALL_LINEAR).eval()
    run: Callable[[], Tensor] = lambda: adapted(token)  # noqa: E731
    while True:
        numbers = turns(lambda: bare(token), {"adapted": run}, 12)
        with adapted.disable_adapter():
            yield turns(lambda: bare(token), {"disabled": run}, 12) | numbers


@measure(
    "decode one token over bfloat16 weights, 12 layers of hidden 256, all-linear r=8",
    repeats=3,
    derive=added,
    limits={"LoRA: added to bare": 0.9, "DoRA: added to bare": 0.2},
)
@torch.no_grad()
def decode_half() -> Iterator[Numbers]:
    """Adapters in float32, as they are by default beside such weights."""
    token, shape = torch.tensor([[1]]), (12, 256, 688, 4)
    bare = frozen(Llama(*shape)).bfloat16().eval()
    models = {
        name: wrapped(Llama(*shape).bfloat16(), target_modules=ALL_LINEAR, use_dora=name == "DoRA").eval()
        for name in ("LoRA", "DoRA")
    }
    runs = {name: partial(model, token) for name, model in models.items()}
    while True:
        yield turns(lambda: bare(token), runs, 8)


@measure("function calls of one forward", repeats=1, unit="", ceilings={"LoRA": 25, "LoRA, two active": 45, "DoRA": 32})
@torch.no_grad()
def forward_calls() -> Iterator[Numbers]:
    """Python and C functions entered by one adapted Linear beyond those of the bare one."""
    x = torch.randn(1, 64)
    bare = stack(1, 64)[0].proj
    cases: dict[str, dict[str, Any]] = {
        "LoRA": {},
        "LoRA, two active": {"two": True},
        "DoRA": {"use_dora": True},
    }
    while True:
        floor = calls(lambda: bare(x))
        yield {name: layer_calls(x, **options) - floor for name, options in cases.items()}


def layer_calls(x: Tensor, two: bool = False, **options: object) -> int:
    """Calls of one adapted layer, after warming up."""
    model = wrapped(stack(1, x.shape[-1]), **options)
    if two:
        model.add_adapter("b", model.peft_config["default"])
        model.base_model.set_adapter(["default", "b"])
    layer = model.eval().base_model.model[0].proj
    for _ in range(3):
        layer(x)
    return calls(lambda: layer(x))


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward and backward, gradients thrown away; x wants one, so that both models go down to the bottom."""

    def run() -> None:
        x.grad = None
        model(x).float().logsumexp(-1).mean().backward()
        if isinstance(model, nn.Module):
            model.zero_grad(set_to_none=True)

    return run


def train(dtype: torch.dtype = torch.float32, **options: object) -> Iterator[Numbers]:
    """Repetitions of one training step of the bare and of the adapted model."""
    x = torch.randn(2, 64, 512, dtype=dtype, requires_grad=True)
    shape = (8, 512, 1376, 8)
    bare = step(frozen(Llama(*shape).to(dtype)), x)
    adapted = step(wrapped(Llama(*shape).to(dtype), r=16, target_modules=ALL_LINEAR, **options).train(), x)
    bare(), adapted()
    while True:
        yield turns(bare, {"step": adapted}, 4)


CEILING = "step: over bare|x"
SHAPE = "train step, 30M Llama shape, 128 tokens, all-linear r=16"


PREFILL = {"r=8: over bare|x": 1.06, "r=64: over bare|x": 1.22}
RANKS = {"r=8: over bare|x": 1.1, "r=16: over bare|x": 1.12, "r=64: over bare|x": 1.33}


@measure("prefill 4 x 256 tokens, 4 Llama layers of 512, all-linear", repeats=3, derive=added, ceilings=PREFILL)
@torch.no_grad()
def prefill() -> Iterator[Numbers]:
    """The same input through models of two ranks."""
    x, shape = torch.randn(4, 256, 512), (4, 512, 1376, 8)
    bare = frozen(Llama(*shape)).eval()
    models = {f"r={r}": wrapped(Llama(*shape), r=r, target_modules=ALL_LINEAR).eval() for r in (8, 64)}
    runs = {name: partial(model, x) for name, model in models.items()}
    while True:
        yield turns(lambda: bare(x), runs, 4)


@measure("train step, 15M Llama shape, 128 tokens, all-linear, ranks", repeats=3, derive=added, ceilings=RANKS)
def train_ranks() -> Iterator[Numbers]:
    """fp32 without dropout, at three ranks."""
    yield from ranks(torch.randn(2, 64, 512, requires_grad=True), 4)


@measure("train step, 8M Llama shape, 2,048 tokens, all-linear, ranks", repeats=1, derive=added, ceilings=RANKS)
def train_long() -> Iterator[Numbers]:
    """The same where rows are many beside the features."""
    yield from ranks(torch.randn(4, 512, 512, requires_grad=True), 2)


def ranks(x: Tensor, layers: int) -> Iterator[Numbers]:
    """Repetitions of a step of the bare model and of three adapted ones."""
    shape = (layers, 512, 1376, 8)
    bare = step(frozen(Llama(*shape)), x)
    steps = {f"r={r}": step(wrapped(Llama(*shape), r=r, target_modules=ALL_LINEAR).train(), x) for r in (8, 16, 64)}
    while True:
        yield turns(bare, steps, 4)


@measure(f"{SHAPE}, dropout 0", repeats=3, derive=added, limits={"step": 1.0}, ceilings={CEILING: 1.12})
def train_plain() -> Iterator[Numbers]:
    """fp32."""
    yield from train()


@measure(f"{SHAPE}, dropout 0.1", repeats=3, derive=added, limits={"step": 1.0}, ceilings={CEILING: 1.25})
def train_dropout() -> Iterator[Numbers]:
    """fp32 with dropout."""
    yield from train(lora_dropout=0.1)


@measure(f"{SHAPE}, bf16 base, fp32 adapters", repeats=3, derive=added, limits={"step": 1.0}, ceilings={CEILING: 1.2})
def train_bf16() -> Iterator[Numbers]:
    """Mixed dtypes."""
    yield from train(torch.bfloat16)


@measure(f"{SHAPE}, bf16 base, fp32 adapters, dropout 0.1", repeats=3, derive=added, limits={"step": 1.0})
def train_bf16_dropout() -> Iterator[Numbers]:
    """Mixed dtypes with dropout."""
    yield from train(torch.bfloat16, lora_dropout=0.1)


@measure(f"{SHAPE}, DoRA", repeats=3, derive=added, limits={"step": 1.0}, ceilings={CEILING: 1.3})
def train_dora() -> Iterator[Numbers]:
    """fp32 DoRA."""
    yield from train(use_dora=True)
