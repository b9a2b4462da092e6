"""`get_peft_model`: many small layers, and the shape of a large model."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.measure import Numbers, calls, measure, seconds
from benchmarks.models import ALL_LINEAR, Llama, stack


def config(r: int = 8, **kwargs: object) -> object:
    """A LoRA configuration for `stack` or, with target_modules=ALL_LINEAR, for `Llama`."""
    from peft import LoraConfig

    return LoraConfig(**{"r": r, "target_modules": ["proj"], **kwargs})


def wrapped(model: nn.Module, **kwargs: object) -> nn.Module:
    """The model under LoRA."""
    from peft import get_peft_model

    return get_peft_model(model, config(**kwargs))


@measure("get_peft_model, 2,000 Linear(8, 8), r=8", repeats=5, limits={"wrap 2,000": 0.2})
def wrap() -> Iterator[Numbers]:
    """Time, objects that the garbage collector tracks, and function calls, per layer where said."""
    wrapped(stack(10, 8))
    keep: list[nn.Module] = []
    while True:
        keep.clear()
        model = stack(2000, 8)
        gc.collect()
        before = len(gc.get_objects())
        spent = seconds(lambda model=model: keep.append(wrapped(model)))
        gc.collect()
        objects = (len(gc.get_objects()) - before) / 2000
        small = stack(200, 8)
        entered = calls(lambda small=small: wrapped(small)) / 200
        yield {
            "wrap 2,000": spent,
            "tracked objects per layer|": objects,
            "calls per layer (of 200)|": entered,
        }


def exponent(numbers: Numbers) -> Numbers:
    """Growth from 2,000 to 20,000 layers; 1 is linear."""
    return {"exponent|": math.log10(numbers["wrap 20,000"] / numbers["wrap 2,000"])}


@measure("get_peft_model, growth to 20,000 layers", repeats=1, derive=exponent, ceilings={"exponent|": 1.1})
def wrap_growth() -> Iterator[Numbers]:
    """The same at ten times the size."""
    wrapped(stack(10, 8))
    while True:
        models = [stack(2000, 8), stack(2000, 8)]
        few = min(seconds(lambda model=model: wrapped(model)) for model in models)
        many = stack(20000, 8)
        yield {"wrap 2,000": few, "wrap 20,000": seconds(lambda many=many: wrapped(many))}


@measure(
    "meta-device wrap, Llama-2-7B shape, 224 targets, r=8",
    repeats=5,
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
