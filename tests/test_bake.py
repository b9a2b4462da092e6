"""A layer's adapter that is deleted while it is merged: what it wrote stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft import LoHaConfig, LoraConfig, OFTConfig, functional, get_peft_model, inject_adapter_in_model
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


def plain() -> Net:
    torch.manual_seed(0)
    return Net()


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


def dora(seed: int) -> LoraConfig:
    torch.manual_seed(seed)
    return LoraConfig(r=2, target_modules=["fc", "emb"], use_dora=True, init_lora_weights=False)


def test_one_adapter_is_merged_for_good_while_another_that_does_not_commute_is_active():
    model = get_peft_model(plain(), dora(0), "one").eval()
    model.add_adapter("two", dora(1))
    expected = answer(model)
    model.set_adapter("two")
    torch.testing.assert_close(answer(model.merge_and_unload(adapter_names=["one"])), expected)


def test_what_is_merged_beside_the_active_adapters_stays_in_a_merge_for_good():
    model = get_peft_model(plain(), lora(), "one").eval()
    model.add_adapter("two", loha())
    model.merge_adapter(["one", "two"])
    expected = answer(model)
    torch.testing.assert_close(answer(model.merge_and_unload()), expected)


def test_a_merge_for_good_that_is_refused_leaves_what_was_merged():
    model = get_peft_model(plain(), lora(), "one").eval()
    model.add_adapter("two", lora())
    model.merge_adapter(["one"])
    before = answer(model)
    with torch.no_grad():
        model.base_model.model.conv.lora_A["two"].weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(adapter_names=["two"])
    assert torch.equal(answer(model), before)
    assert all(layer.merged_adapters == ["one"] for layer in layers(model))
