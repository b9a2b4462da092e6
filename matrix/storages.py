"""The columns for storages: a quantised layer is adapted and trains, and is what it was when the adapter is off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import bases
from .layouts import Cell, works
from .probe import NotAsked, Probe, need
from .rows import Row

WIDE = 64  # features, as many as the kinds pack together


class Held(nn.Module):
    """One quantised layer to adapt, and a head behind it."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.head = nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.target(x)))


def four_bit(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def store(linear: nn.Linear) -> nn.Module:
        import bitsandbytes

        made = bitsandbytes.nn.Linear4bit(WIDE, WIDE, quant_type=kind, compress_statistics=True)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    return store


def eight_bit(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    made = bitsandbytes.nn.Linear8bitLt(WIDE, WIDE, has_fp16_weights=False, threshold=6.0)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def torchao(config: Callable[[Any], Any]) -> Callable[[nn.Linear], nn.Module]:
    def store(linear: nn.Linear) -> nn.Module:
        from torchao import quantization

        held = nn.Sequential(linear)
        quantization.quantize_(held, config(quantization))
        return held[0].requires_grad_(False)

    return store


def hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core import quantize

    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=WIDE)
    return quantize.HQQLinear(linear.requires_grad_(False), settings, compute_dtype=torch.float32, device="cpu")


def of_storage(store: Callable[[nn.Linear], nn.Module]) -> Cell:
    def build() -> tuple[nn.Module, dict]:
        return Held(store(nn.Linear(WIDE, WIDE))), {"x": bases.floats(3, 5, WIDE)}

    def cell(row: Row, folder: Path) -> str:
        if row.base.startswith("llama") or row.base != "layers":
            raise NotAsked
        probe = Probe(row, build, ["target"], folder)
        answer = works(probe)
        base, inputs = probe.base()
        model, _ = probe.wrapped()
        with torch.no_grad(), model.disable_adapter():
            need(torch.equal(probe.run(model, inputs), probe.run(base, inputs)), "the base has changed")
        return answer

    return cell


STORAGES: dict[str, Cell] = {
    name: of_storage(store)
    for name, store in {
        "nf4 (bitsandbytes)": four_bit("nf4"),
        "fp4 (bitsandbytes)": four_bit("fp4"),
        "int8 (bitsandbytes)": eight_bit,
        "int8 (torchao)": torchao(lambda q: q.Int8WeightOnlyConfig()),
        "int8 dynamic (torchao)": torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()),
        "int4 (torchao)": torchao(
            lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))
        ),
        "hqq": hqq,
    }.items()
}
