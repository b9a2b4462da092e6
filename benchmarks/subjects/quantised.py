"""Training on quantised bases, against the bare quantised model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.measure import Numbers, added, measure, turns
from benchmarks.models import ALL_LINEAR, Llama, frozen
from benchmarks.subjects.steps import step
from benchmarks.subjects.wrapping import wrapped

SHAPE = "train step, 30M Llama shape, 128 tokens, all-linear r=16"


def nf4(model: nn.Module) -> nn.Module:
    """The decoder's linear layers in NF4, computing in the dtype of their inputs."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name in ALL_LINEAR:
                made = bnb.nn.Linear4bit(child.in_features, child.out_features, False, torch.float32, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, made.to("cpu"))
    return model


def int8(model: nn.Module) -> nn.Module:
    """The decoder's linear layers with torchao's int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), lambda child, path: path.rpartition(".")[2] in ALL_LINEAR)
    return model


def train(quantise: Callable[[nn.Module], nn.Module]) -> Iterator[Numbers]:
    """Repetitions of one training step of the bare and of the adapted model."""
    x = torch.randn(2, 64, 512, requires_grad=True)
    shape = (8, 512, 1376, 8)
    bare = step(frozen(quantise(Llama(*shape))), x)
    adapted = step(wrapped(quantise(Llama(*shape)), r=16, target_modules=ALL_LINEAR).train(), x)
    bare(), adapted()
    while True:
        yield turns(bare, {"step": adapted}, 4)


CEILINGS = {"step: over bare|x": 1.25}


@measure(f"{SHAPE}, nf4 base of bitsandbytes", repeats=3, derive=added, limits={"step": 1.0}, ceilings=CEILINGS)
def train_nf4() -> Iterator[Numbers]:
    """Four bits."""
    yield from train(nf4)


@measure(f"{SHAPE}, int8 base of torchao", repeats=3, derive=added, limits={"step": 1.0}, ceilings=CEILINGS)
def train_int8() -> Iterator[Numbers]:
    """Eight bits."""
    yield from train(int8)
