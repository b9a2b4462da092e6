"""`get_peft_model`: many small layers, and the shape of a large model."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import Numbers, calls, measure, seconds, several
from benchmarks.models import ALL_LINEAR, Llama, stack


def config(r: int = 8, **kwargs: object) -> object:
    """A LoRA configuration for `stack` or, with target_modules=ALL_LINEAR, for `Llama`."""
    from peft import LoraConfig

    return LoraConfig(**{"r": r, "target_modules": ["proj"], **kwargs})


def wrapped(model: nn.Module, **kwargs: object) -> nn.Module:
    """The model under LoRA."""
    from peft import get_peft_model

    return get_peft_model(model, config(**kwargs))


PAYLOAD = 2 * 8 * 8 * 4  # bytes of the parameters of one layer


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@measure(
    "get_peft_model, 2,000 Linear(8, 8), r=8",
    repeats=3,
    limits={"wrap 2,000": 0.05},
    ceilings={"tracked objects per layer|": 20, "calls per layer|": 120},
    derive=lambda numbers: {"second over first|x": numbers["second adapter"] / numbers["wrap 2,000"]},
)
def wrap() -> Iterator[Numbers]:
    """Time, and per layer: objects that the garbage collector tracks, function calls (of another 200 layers)."""
    wrapped(stack(10, 8))
    counts = per_layer()
    keep: list[nn.Module] = []
    while True:
        keep.clear()
        model = stack(2000, 8)
        spent = seconds(lambda model=model: keep.append(wrapped(model)))
        second = seconds(lambda keep=keep: keep[0].add_adapter("b", config()))
        yield {"wrap 2,000": spent, "second adapter": second, **counts}


def per_layer() -> Numbers:
    """What is counted: the same in every repetition."""
    few = tracked(stack(10, 8))
    objects = (tracked(stack(210, 8)) - few) / 200
    small, larger = stack(100, 8), stack(300, 8)
    entered = [calls(lambda m=m: wrapped(m)) for m in (small, larger)]
    return {"tracked objects per layer|": objects, "calls per layer|": (entered[1] - entered[0]) / 200}


def tracked(model: nn.Module) -> int:
    """Objects that wrapping a model leaves."""
    gc.collect()
    before = len(gc.get_objects())
    kept = wrapped(model)
    gc.collect()
    return len(gc.get_objects()) - before + 0 * len(kept._modules)


MEMORY = """
import gc, sys, torch
from benchmarks.models import stack
from benchmarks.subjects.wrapping import PAYLOAD, resident, wrapped
wrapped(stack(10, 8))
model = stack(8000, 8)
gc.collect()
before = resident()
kept = wrapped(model)
print((resident() - before) / 8000 / PAYLOAD)
"""


@measure(
    "resident memory of get_peft_model over the payload, 8,000 Linear(8, 8)",
    repeats=1,
    unit="x",
    ceilings={"memory": 10},
)
def wrap_memory() -> Iterator[Numbers]:
    """In a process of its own, as memory that is freed stays resident."""
    while True:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True, text=True, check=True
        )
        yield {"memory": float(done.stdout.split()[-1])}


def exponent(numbers: Numbers) -> Numbers:
    """Growth from 2,000 to 20,000 layers; 1 is linear."""
    return {"exponent|": math.log10(numbers["wrap 20,000"] / numbers["wrap 2,000"])}


@measure("get_peft_model, growth to 20,000 layers", repeats=1, derive=exponent, ceilings={"exponent|": 1.05})
def wrap_growth() -> Iterator[Numbers]:
    """The same at ten times the size, each three times where that is quick."""
    wrapped(stack(10, 8))
    while True:
        sizes = {"wrap 2,000": 2000, "wrap 20,000": 20000}
        yield {key: min(several(lambda layers=layers: wrapping(layers), 3, 5.0)) for key, layers in sizes.items()}


def wrapping(layers: int) -> float:
    """Seconds of wrapping a new stack."""
    model = stack(layers, 8)
    return seconds(lambda: wrapped(model))


@measure(
    "meta-device wrap, Llama-2-7B shape, 224 targets, r=8",
    repeats=4,
    ceilings={"wrap": 0.3, "second adapter": 0.3},
)
def wrap_meta() -> Iterator[Numbers]:
    """First and second adapter on 32 layers of 4096 / 11008, nothing allocated."""
    while True:
        with torch.device("meta"):
            model = Llama(32, 4096, 11008, 32, 32000)
        keep: list[nn.Module] = []
        first = seconds(lambda model=model, keep=keep: keep.append(wrapped_meta(model, target_modules=ALL_LINEAR)))
        second = seconds(
            lambda keep=keep: keep[0].add_adapter("b", config(target_modules=ALL_LINEAR), low_cpu_mem_usage=True)
        )
        targets = sum(hasattr(m, "base_layer") for m in keep[0].modules())
        yield {"wrap": first, "second adapter": second, "targets|": targets}


def wrapped_meta(model: nn.Module, **kwargs: object) -> nn.Module:
    """The model under LoRA whose tensors stay on the meta device."""
    from peft import get_peft_model

    return get_peft_model(model, config(**kwargs), low_cpu_mem_usage=True)
