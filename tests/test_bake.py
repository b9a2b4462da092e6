"""A layer's adapter that is deleted while it is merged: what it wrote stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft import LoHaConfig, LoraConfig, OFTConfig, functional, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

X = torch.linspace(-1, 1, 12).view(2, 6)
IDS = torch.tensor([[1, 2], [0, 3]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.emb, self.conv = nn.Linear(6, 4), nn.Embedding(5, 4), nn.Conv1d(2, 2, 3)

    def forward(self) -> torch.Tensor:
        return self.conv((self.fc(X) + self.emb(IDS)[0])[None]).flatten()


def made(dtype: torch.dtype = torch.float32, **configs: Any) -> Net:
    """Each adapter by name, on all three layers."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    for name, config in (configs or {"one": lora(), "two": lora(bias=True), "three": loha()}).items():
        inject_adapter_in_model(config, model, name)
    for layer in layers(model):
        layer.set_adapter(list(layer.adapters))
    return model.eval()


def lora(bias: bool = False) -> LoraConfig:
    targets = ["fc", "conv"] if bias else ["fc", "emb", "conv"]
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False, lora_bias=bias)


def loha() -> LoHaConfig:
    return LoHaConfig(r=2, target_modules=["fc", "conv"], init_weights=False)


def layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def delete(model: nn.Module, name: str) -> None:
    for layer in layers(model):
        layer.delete_adapter(name)


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    return model()


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_the_weight_stays_and_the_others_can_still_be_unmerged(name):
    model, twin = made(), made()
    for layer in layers(model):
        layer.merge()
    merged = answer(model)
    weights = [layer.get_base_layer().weight.clone() for layer in layers(model)]
    delete(model, name)
    assert all(torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers(model), weights, strict=True))
    assert torch.equal(answer(model), merged)
    for layer in layers(model):
        assert name not in layer.adapters and name not in layer.merged_adapters
        if layer.merged:
            layer.unmerge()
    torch.testing.assert_close(answer(model), merged)
    for layer in layers(model):
        layer.enable_adapters(False)
    for layer in layers(twin):
        layer.set_adapter([name] if name in layer.adapters else [])
    torch.testing.assert_close(answer(model), answer(twin))


def test_all_of_them_one_after_the_other():
    model = made()
    for layer in layers(model):
        layer.merge()
    merged = answer(model)
    for name in ("two", "one", "three"):
        delete(model, name)
        assert torch.equal(answer(model), merged)
    assert not any(layer.merged or layer.adapters for layer in layers(model))
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "hada" in name]


def test_a_scale_that_has_changed_since_does_not_matter():
    model = made(one=lora())
    for layer in layers(model):
        layer.merge()
    merged = answer(model)
    for layer in layers(model):
        layer.set_scale("one", 100.0)
    delete(model, "one")
    assert torch.equal(answer(model), merged)


def test_a_disabled_layer_holds_nothing_that_could_stay():
    model = made()
    for layer in layers(model):
        layer.merge()
        layer.enable_adapters(False)
    base = answer(model)
    delete(model, "one")
    assert torch.equal(answer(model), base)
    for layer in layers(model):
        layer.enable_adapters(True)
        assert "one" not in layer.merged_adapters
    twin = made()
    for layer in layers(twin):
        layer.set_adapter(["two", "three"])
    torch.testing.assert_close(answer(model), answer(twin))


def test_methods_that_do_not_commute_are_not_told_apart():
    model = made(one=lora(), two=OFTConfig(target_modules=["fc"], oft_block_size=2, init_weights=False))
    for layer in layers(model):
        layer.merge()
    before = answer(model)
    with pytest.raises(ValueError, match=r"'one' while it is merged together with \['two'\] at 'fc'"):
        delete(model, "one")
    assert torch.equal(answer(model), before)
    model.fc.unmerge()
    delete(model, "one")


def test_a_bare_model_s_adapter_is_deleted_likewise():
    model = made(one=lora())
    for layer in layers(model):
        layer.merge()
    merged = answer(model)
    functional.delete_adapter(model, "one", "lora_")
    assert torch.equal(answer(model), merged)
