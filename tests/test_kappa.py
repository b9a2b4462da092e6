"""Targets chosen by condition numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, find_kappa_target_modules, get_peft_model
from peft.helpers import KappaTuneSelector


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.stack([torch.diag(torch.tensor([1.0, k])) for k in (2.0, 4.0)]))
        self.table = nn.Parameter(torch.randn(2, 3, 3))


class Net(nn.Module):
    """Linear layers of known condition numbers, 1, 2 and 5, a long one, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.uneven, self.steep = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 3)
        self.long, self.table, self.experts = nn.Linear(40, 2), nn.Embedding(4, 3), Experts()
        with torch.no_grad():
            self.even.weight.copy_(torch.eye(3))
            self.uneven.weight.copy_(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
            self.steep.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
            self.long.weight.copy_(torch.cat([torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(2, 38)], 1))


@pytest.fixture
def selector():
    return KappaTuneSelector(Net(), show_progress=False)


def test_layers_come_in_the_order_of_their_condition_numbers(selector):
    assert selector.get_best_targets() == ["even", "uneven", "long", "steep"]
    assert selector.get_best_targets(top_p=0.5) == ["even", "uneven"]
    assert selector.get_best_targets(top_p=0.1) == ["even"]
    assert selector.get_best_targets(threshold=2.5) == ["even", "uneven"]
    assert selector.get_best_targets(num_modules=3, top_p=0.1, threshold=0) == ["even", "uneven", "long"]
    assert selector.get_best_target_parameters() == ["experts.up_proj"]
    assert selector.get_best_target_parameters(threshold=2.9) == []
    assert selector.get_best_target_parameters(threshold=3.1) == ["experts.up_proj"]


def test_what_is_found_makes_a_configuration():
    found = find_kappa_target_modules(Net(), top_p=0.5, show_progress=False)
    assert found == {"target_modules": ["even", "uneven"], "target_parameters": ["experts.up_proj"]}
    model = get_peft_model(Net(), LoraConfig(**found))
    assert set(model.targeted_module_names) == {"even", "uneven"}
    assert find_kappa_target_modules(model.base_model.model, top_p=0.5, show_progress=False)["target_modules"] == [
        "even",
        "uneven",
    ]


def test_long_matrices_are_left_out_and_other_experts_named():
    found = find_kappa_target_modules(Net(), 1.0, 30, moe_param_suffixes=(".table",), show_progress=False)
    assert found == {"target_modules": ["even", "uneven", "steep"], "target_parameters": ["experts.table"]}
    nothing = find_kappa_target_modules(nn.Sequential(nn.Embedding(3, 2)), show_progress=False)
    assert nothing == {"target_modules": [], "target_parameters": None}


def test_weights_without_numbers_are_refused():
    empty = nn.Sequential(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="'0' has no numbers yet"):
        KappaTuneSelector(empty, show_progress=False).get_best_targets()
