"""Several adapters on one model: switching between them, and loading the first and the twentieth."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from benchmarks.measure import Numbers, in_a_row, measure, seconds, smallest
from benchmarks.models import ALL_LINEAR, Llama, stack
from benchmarks.subjects.wrapping import config, wrapped


@measure(
    "set_adapter, 2,000 layers, 2 adapters",
    repeats=4,
    limits={"set_adapter": 0.01, "frozen": 0.01, "disable_adapter": 0.01},
)
def switch() -> Iterator[Numbers]:
    """There and back, and into and out of disable_adapter."""
    model = wrapped(stack(2000, 8))
    model.add_adapter("b", config())

    def toggle() -> None:
        with model.disable_adapter():
            pass

    def turn() -> None:
        model.set_adapter("b")
        model.set_adapter("default")

    while True:
        both = smallest(turn, 2, 3)
        frozen = in_a_row(partial(freeze, model, name) for name in ("b", "default", "b", "default"))
        yield {"set_adapter": both / 2, "frozen": min(frozen), "disable_adapter": seconds(toggle)}


def freeze(model: nn.Module, name: str) -> None:
    """A switch after which nothing is trainable."""
    model.base_model.set_adapter(name, inference_mode=True)  # type: ignore[operator, union-attr]


def growth(numbers: Numbers) -> Numbers:
    """How much dearer the twentieth is than the first, and all hundred than reading their files."""
    return {
        "20th over 2nd|x": numbers["20th"] / numbers["2nd"],
        "100 over reading|x": numbers["100 adapters"] / numbers["reading the file"] / 100,
        "from_pretrained over reading|x": numbers["from_pretrained"] / numbers["reading the file"],
    }


LOADS = {"2nd": 0.06, "40th": 0.01}
GROWTH = {"20th over 2nd|x": 1.2, "100 over reading|x": 5, "from_pretrained over reading|x": 3}


@measure("load adapters from disk, 28 targets, r=8", repeats=2, derive=growth, limits=LOADS, ceilings=GROWTH)
def load() -> Iterator[Numbers]:
    """save_pretrained, from_pretrained, then load_adapter up to the hundredth; reading is safetensors' own.

    Where a hundred take long they are loaded once, and further repetitions end with the fortieth.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        source, last = wrapped(small(), target_modules=ALL_LINEAR, init_lora_weights=False), 101
        while True:
            saving = seconds(lambda: source.save_pretrained(folder))
            first, model = loaded(folder)
            add = model.load_adapter
            times = in_a_row(partial(add, folder, adapter_name=f"a{i}") for i in range(2, last + 1))
            hundred = {"100 adapters": sum(times)} if last == 101 else {}
            last = 101 if sum(times) < 5 else 41
            yield {
                "save_pretrained": saving,
                "from_pretrained": first,
                "2nd": min(times[:2]),
                "20th": min(times[18:20]),
                "40th": min(times[38:40]),
                **hundred,
                "reading the file": smallest(lambda: load_file(f"{folder}/adapter_model.safetensors"), 5),
            }


def over_files(numbers: Numbers) -> Numbers:
    """How much dearer an adapter is than its files."""
    return {
        "from_pretrained over reading|x": numbers["from_pretrained"] / numbers["reading the files"],
        "save_pretrained over writing|x": numbers["save_pretrained"] / numbers["writing the file"],
    }


FILES = {"from_pretrained over reading|x": 3, "save_pretrained over writing|x": 1.1}


@measure("files of an adapter, 28 targets, r=64", repeats=5, derive=over_files, limits={"2nd": 0.06}, ceilings=FILES)
def files() -> Iterator[Numbers]:
    """Saving and loading beside safetensors' own reading and writing of the same tensors, on the same disk."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        source = wrapped(small(), r=64, target_modules=ALL_LINEAR, init_lora_weights=False)
        source.save_pretrained(folder)
        file = f"{folder}/adapter_model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}

        def read() -> None:
            load_file(file)
            with open(f"{folder}/adapter_config.json") as handle:
                json.load(handle)

        while True:
            first, model = loaded(folder)
            yield {
                "save_pretrained": smallest(lambda: source.save_pretrained(folder), 3),
                "from_pretrained": first,
                "2nd": seconds(partial(model.load_adapter, folder, adapter_name="a")),
                "reading the files": smallest(read, 3),
                "writing the file": smallest(lambda: save_file(tensors, f"{folder}/tensors.safetensors"), 3),
            }


def loaded(folder: str) -> tuple[float, Any]:
    """Seconds of `from_pretrained`, the smallest of three in a row as for reading and writing, and one of the models.

    So files and code are in the caches, as they are for what it is compared with.
    """
    from peft import PeftModel

    keep: list[nn.Module] = []
    bases = [small() for _ in range(3)]
    return min(
        in_a_row(lambda base=base: keep.append(PeftModel.from_pretrained(base, folder)) for base in bases)
    ), keep[0]


def small() -> nn.Module:
    """4 layers of hidden 256."""
    return Llama(4, 256, 688, 4, 512)
