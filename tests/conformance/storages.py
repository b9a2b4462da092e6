"""The quantised storages that run on any machine: a model around one linear layer whose weight each of them holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft.core import storage as storages

from .layouts import SAMPLES, Around, Layout

IN, OUT = 192, 32
warnings.filterwarnings("ignore", module="bitsandbytes|torchao|hqq")


def nf4(linear: nn.Linear, **settings: Any) -> nn.Module:
    """bitsandbytes' Linear4bit."""
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(IN, OUT, **{"quant_type": "nf4", "compress_statistics": True, **settings})
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def fp4(linear: nn.Linear) -> nn.Module:
    """The same with the other code, scales as they are, and bytes hidden in a floating dtype."""
    return nf4(linear, quant_type="fp4", compress_statistics=False, quant_storage=torch.bfloat16)


def int8(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' LLM.int8(); inputs above the threshold are outliers."""
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=2.0)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def torchao(config: Callable[[Any], Any]) -> Callable[[nn.Linear], nn.Module]:
    """A configuration of torchao's `quantize_`."""

    def make(linear: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        held = nn.Sequential(linear)
        quantization.quantize_(held, config(quantization))
        return held[0].requires_grad_(False)

    return make


def hqq(linear: nn.Linear) -> nn.Module:
    """HQQ's layer, four bits in groups."""
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    return quantize.HQQLinear(linear.requires_grad_(False), settings, compute_dtype=linear.weight.dtype, device="cpu")


def small_ints(quantization: Any) -> Any:
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))


@dataclass(frozen=True)
class Stored(Layout):
    """A linear layer in a storage. `error` bounds what its own kernel adds to W x, relative to the largest output."""

    store: Callable[[nn.Linear], nn.Module] = nf4
    error: float = 4e-6

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with the quantised layer."""
        torch.manual_seed(7)
        return Around(self.store(nn.Linear(IN, OUT).to(dtype))).eval()

    def base(self, x: Tensor) -> Tensor:
        """What the library computes without adapters, as it does where gradients are wanted."""
        return self.model()(x.clone().requires_grad_()).detach()

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with a dense layer of the same numbers."""
        quantised = self.model(dtype).layer
        dense = nn.Linear(IN, OUT, device="meta")
        dense.weight = nn.Parameter(numbers(quantised).to(dtype))
        dense.bias = nn.Parameter(quantised.bias.detach().clone())
        return Around(dense).requires_grad_(False).eval()


def numbers(module: nn.Module) -> Tensor:
    """The weight that a layer holds, read."""
    return storages.of(module, "weight").read(module, "weight").clone()


def payload(module: nn.Module) -> list[Tensor]:
    """Copies of all tensors by which a layer holds its weight."""
    found = storages.of(module, "weight").save(module, "weight")
    return [t.detach().clone() for t in _tensors(found)]


def _tensors(held: Any) -> list[Tensor]:
    if isinstance(held, Tensor):
        names = getattr(held, "__tensor_flatten__", None)
        return [held] if names is None else _tensors([getattr(held, n, None) for n in names()[0]])
    if isinstance(held, dict):
        return _tensors(list(held.values()))
    if isinstance(held, (list, tuple)):
        return [t for part in held for t in _tensors(part)]
    if type(held).__name__ == "QuantState":
        return _tensors([held.absmax, held.code, held.offset, held.state2])
    return []


def stored(name: str, store: Callable[[nn.Linear], nn.Module], error: float = 4e-6) -> Stored:
    return Stored(f"linear-{name}", lambda: nn.Identity(), (SAMPLES, IN), store=store, error=error)


STORAGES = {
    layout.name.removeprefix("linear-"): layout
    for layout in (
        stored("nf4", nf4),
        stored("fp4", fp4),
        stored("int8", int8, 2e-2),  # the library rounds the input, too
        stored("torchao-int8", torchao(lambda q: q.Int8WeightOnlyConfig())),
        stored("torchao-int8-dynamic", torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()), 2e-2),
        stored("torchao-int4", torchao(small_ints)),
        stored("hqq", hqq),
    )
}
