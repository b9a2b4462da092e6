"""Adapters combined by decomposition, and put in each other's place in a model that runs."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from torch import nn

from benchmarks.measure import Numbers, measure, seconds
from benchmarks.subjects.wrapping import config, wrapped

TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "up", "down", "gate")]


def layers(depth: int, width: int) -> nn.Module:
    """`depth` layers of seven square matrices: the targets of a decoder, without its sizes."""
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(width, width) for name in TARGETS}) for _ in range(depth)
    )
    return model


@measure('add_weighted_adapter("svd"), one 4096 x 4096 layer, ranks 16 and 16', repeats=1, limits={"combine": 0.01})
def combine() -> Iterator[Numbers]:
    """Two adapters to one of rank 16; the dense update alone has 64 MiB."""
    two_adapters(128)()  # what is imported and set up once
    once = two_adapters(4096)
    while True:
        yield {"combine": seconds(once)}


def two_adapters(width: int) -> Callable[[], None]:
    """What combines the two adapters of a layer."""
    fields = {"r": 16, "init_lora_weights": False, "target_modules": ["0"]}
    model = wrapped(nn.Sequential(nn.Linear(width, width, bias=False)), **fields)
    model.add_adapter("b", config(**fields))
    names = (f"mix{i}" for i in count())

    def once() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.base_model.add_weighted_adapter(["default", "b"], [0.7, -0.3], next(names), "svd", svd_rank=16)

    return once


@measure(
    "hot-swap, 224 targets of 64 x 64, room of rank 16",
    repeats=5,
    ceilings={"same rank": 0.02, "another rank": 0.02, "pool: from memory": 0.02},
)
def swap() -> Iterator[Numbers]:
    """Adapters of rank 16 and 8 written into a prepared model, from files and from memory."""
    from peft import get_peft_model_state_dict
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    def made(rank: int) -> Any:
        return wrapped(layers(32, 64), r=rank, target_modules=TARGETS, init_lora_weights=False)

    model, others = made(16), {"same rank": made(16), "another rank": made(8)}
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    states = {key: (get_peft_model_state_dict(m), m.peft_config["default"]) for key, m in others.items()}
    pool = pooled(made(16), states)
    with tempfile.TemporaryDirectory() as folder:
        others["another rank"].save_pretrained(folder)
        while True:
            numbers = {"from files": seconds(lambda: hotswap_adapter(model, folder, "default"))}
            yield {**numbers, **(memory(model, states) | turns(pool) if pool is not None else {})}


def memory(model: Any, states: Any) -> Numbers:
    """The same by tensors that are there."""
    from peft.utils.hotswap import hotswap_adapter_from_state_dict as put

    return {key: seconds(lambda s=s, c=c: put(model, s, "default", c)) for key, (s, c) in states.items()}


def pooled(model: Any, states: Any) -> Any:
    """A pool with room for two of three adapters in the model; None where the library has none."""
    try:
        from peft.hotswap import AdapterPool
    except ImportError:
        return None
    pool = AdapterPool(model, slots=2)
    for name, (state, settings) in states.items():
        pool.register(name, state, settings)
    return pool


def turns(pool: Any) -> Numbers:
    """An adapter that is in CPU memory, and one that is in the model already."""
    names = ["default", "same rank", "another rank"]
    for name in names:
        pool.activate(name)
    from_memory = seconds(lambda: pool.activate(names[0]))
    return {"pool: from memory": from_memory, "pool: between slots": seconds(lambda: pool.activate(names[2]))}
