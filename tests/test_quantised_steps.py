"""Training over quantised weights: gradients without a dense weight, where the numbers allow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft import LoraConfig, get_peft_model
from peft.storages.torchao import TorchAO

quantization = pytest.importorskip("torchao.quantization")

WAYS = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int8 dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    "int8 in groups": lambda: quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(16)),
}


def layer(way: str, dtype: torch.dtype, zeros: bool = False) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 24, dtype=dtype))
    quantization.quantize_(base, WAYS[way]())
    held = base[0].weight
    if zeros:
        held.zero_point = torch.arange(held.scale.numel(), dtype=torch.int8).view(held.scale.shape) % 5
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    return model.base_model.model[0]


def gradient(module: nn.Module, x: Tensor) -> Tensor:
    """Of x, for a sum whose parts count differently."""
    x = x.detach().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("way", "zeros"), [("int8", False), ("int8", True), ("int8 dynamic", False)])
def test_rows_of_integers_give_gradients_without_their_numbers(
    way: str, zeros: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, x = layer(way, dtype, zeros), torch.randn(2, 3, 32, dtype=dtype)
    W = adapted.base_weight()
    with monkeypatch.context() as only:
        only.setattr(TorchAO, "pull", lambda *_: None)
        expected = gradient(adapted, x)
    monkeypatch.setattr(TorchAO, "unpack", lambda *_: pytest.fail("the numbers were made"))
    found = gradient(adapted, x)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, expected, **close)
    assert zeros == bool(adapted.get_base_layer().weight.zero_point.any()) and W.abs().max() > 0


def test_other_blocks_are_read_as_numbers() -> None:
    adapted, x = layer("int8 in groups", torch.float32), torch.randn(3, 32)
    base = adapted.get_base_layer()
    assert TorchAO().pull(base, "weight", torch.randn(3, 24)) is None
    W = adapted.base_weight() + adapted.get_delta_weight("default")
    torch.testing.assert_close(gradient(adapted, x), (torch.linspace(-1, 1, 24) @ W).expand(3, 32))


@pytest.mark.parametrize("way", ("int8", "int8 dynamic", "int8 in groups"))
def test_no_number_of_the_weight_is_kept_for_the_backward_pass(way: str) -> None:
    adapted, kept = layer(way, torch.float32), []
    own = {p.untyped_storage().data_ptr() for p in adapted.adapter_parameters("default")}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted(torch.randn(2, 32, requires_grad=True))
    made = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert kept and max(t.numel() for t in made) < 24 * 32
