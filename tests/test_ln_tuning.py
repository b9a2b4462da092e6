"""LN tuning beside what the conformance tests ask: modules that are no affine map, their buffers, other methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
from peft import LNTuningConfig, LoraConfig, get_peft_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.ln, self.act = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln(self.act(self.bn(self.fc(x))))


def net():
    torch.manual_seed(0)
    return Net()


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items() if "ln_tuning_" not in n}


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_training_moves_the_copies_and_nothing_of_the_base(x):
    model = get_peft_model(net(), LNTuningConfig(target_modules=["bn", "ln"]))
    before = state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[n], t) for n, t in state(model).items())
    copy = model.base_model.model.bn.ln_tuning_layers["default"]
    assert copy.num_batches_tracked == 1 and not torch.equal(copy.bias, before["base_model.model.bn.base_layer.bias"])
    wanted = model.eval()(x)
    model.merge_adapter()
    assert torch.equal(model(x), wanted)
    model.unmerge_adapter()
    assert all(torch.equal(before[n], t) for n, t in state(model).items())
    assert torch.equal(model.merge_and_unload()(x), wanted)


def test_a_second_copy_starts_from_the_module_also_while_the_first_is_merged():
    model = get_peft_model(net(), LNTuningConfig(target_modules=["ln"]))
    layer = model.base_model.model.ln
    with torch.no_grad():
        layer.ln_tuning_layers["default"].weight.fill_(3.0)
    model.merge_adapter()
    model.add_adapter("other", LNTuningConfig(target_modules=["ln"]))
    assert torch.equal(layer.ln_tuning_layers["other"].weight, torch.ones(8))


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameters"):
        get_peft_model(net(), LNTuningConfig(target_modules=["act"]))


def test_a_bias_rule_of_its_own_is_refused():
    with pytest.raises(ValueError, match="bias"):
        LNTuningConfig(target_modules=["ln"], bias="ln_tuning_only")


def test_a_layer_that_another_method_adapts_is_refused():
    model = get_peft_model(net(), LoraConfig(target_modules=["fc"]))
    with pytest.raises(ValueError, match="another method"):
        model.add_adapter("second", LNTuningConfig(target_modules=["fc"]))
    assert list(model.peft_config) == ["default"]


def test_the_plan_counts_what_is_copied():
    table = peft.plan(net(), LNTuningConfig(target_modules=["bn", "ln"]))
    assert [row.trainable for row in table.rows] == [16, 16]
