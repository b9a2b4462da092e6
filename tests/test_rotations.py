"""Rotations: what training drops or stores, and what is told or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
from peft import BOFTConfig, DeloraConfig, HRAConfig, OFTConfig, PeftConfig, RoadConfig, get_peft_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def wrapped(config):
    torch.manual_seed(0)
    model = get_peft_model(Net(), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) / 2)
    return model


def x():
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(1))


def turned(model):
    """The base weight and what training makes of it this once."""
    layer = model.base_model.model.fc
    p = layer.adapters["default"]
    return p.method.live_weight(p, layer.base_layer.weight)


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(target_modules=["fc"], oft_block_size=3, module_dropout=0.5),
        BOFTConfig(target_modules=["fc"], boft_block_size=3, boft_dropout=0.5),
    ],
    ids=["oft", "boft"],
)
def test_dropout_puts_blocks_by_the_identity_in_training_only(config):
    model = wrapped(config)
    W = model.base_model.model.fc.base_layer.weight
    s = model.base_model.model.fc.boft_s["default"] if config.peft_type == "BOFT" else 1.0
    whole = turned(model.eval())
    seen = []
    model.train()
    for _ in range(20):
        W1 = turned(model)
        for block in torch.arange(12).split(3):
            left = torch.allclose(W1[:, block], (s * W)[:, block], atol=1e-6)
            assert left or torch.allclose(W1[:, block], whole[:, block], atol=1e-6)
            seen.append(left)
    assert 0.2 < sum(seen) / len(seen) < 0.8
    assert len({model(x()).sum().item() for _ in range(20)}) > 1
    assert torch.equal(model.eval()(x()), model(x()))


def test_merging_in_training_drops_nothing():
    model = wrapped(OFTConfig(target_modules=["fc"], oft_block_size=3, module_dropout=0.9)).train()
    with torch.no_grad():
        wanted = model.eval()(x())
        model.train().merge_adapter()
        torch.testing.assert_close(model(x()), wanted)


def test_a_constrained_rotation_is_stored_cut_in_training_and_left_alone_in_evaluation():
    model = wrapped(OFTConfig(target_modules=["fc"], oft_block_size=3, coft=True, eps=0.1))
    held = model.base_model.model.fc.oft_R["default"].weight
    before = held.detach().clone()
    wanted = model.eval()(x())
    assert torch.equal(held, before)
    torch.testing.assert_close(model.train()(x()), wanted)
    size = 2**0.5 * held.norm(dim=-1)
    torch.testing.assert_close(size, torch.full((4,), 0.1 / 2))  # eps / sqrt(blocks)


def test_a_series_is_nearly_the_inverse_of_the_exact_rotation():
    exact = wrapped(OFTConfig(target_modules=["fc"], oft_block_size=3, use_cayley_neumann=False))
    model = wrapped(OFTConfig(target_modules=["fc"], oft_block_size=3, num_cayley_neumann_terms=60))
    with torch.no_grad():
        for m in (exact, model):
            m.base_model.model.fc.oft_R["default"].weight.mul_(0.3)
        p = model.base_model.model.fc.adapters["default"]
        back = p.method.weight(p, turned(exact))
    torch.testing.assert_close(back, exact.base_model.model.fc.base_layer.weight)


@pytest.mark.parametrize(
    "fields, found", [({"oft_block_size": 5}, 4), ({"oft_block_size": 64}, 12), ({"oft_block_size": 0, "r": 5}, 3)]
)
def test_blocks_that_do_not_fit_become_the_nearest_that_do(fields, found):
    with pytest.warns(peft.PeftWarning, match="does not divide the 12 features of 'fc'"):
        model = get_peft_model(Net(), OFTConfig(target_modules=["fc"], **fields))
    assert model.base_model.model.fc.oft_block_size["default"] == found


def test_files_of_an_older_parametrisation_are_refused_or_told():
    old = {"peft_type": "OFT", "r": 4}
    with pytest.raises(ValueError, match="oft_block_size"):
        PeftConfig.from_peft_type(**old)
    with pytest.warns(peft.PeftWarning, match=r"0\.18"):
        PeftConfig.from_peft_type(**old | {"oft_block_size": 0, "peft_version": "0.17.1"})


@pytest.mark.parametrize("fields", [{"r": 3}, {"apply_GS": True, "r": 4}])
def test_mirrors_that_do_not_start_at_the_base_model_are_told(fields):
    with pytest.warns(peft.PeftWarning, match="does not start at the base model"):
        get_peft_model(Net(), HRAConfig(target_modules=["fc"], **fields))


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: OFTConfig(r=2), "oft_block_size"),
        (lambda: OFTConfig(oft_block_size=0), "oft_block_size"),
        (lambda: BOFTConfig(boft_block_num=2), "boft_block_num"),
        (lambda: wrapped(BOFTConfig(target_modules=["fc"], boft_block_size=5)), "boft_block_size=5"),
        (lambda: wrapped(BOFTConfig(target_modules=["fc"], boft_block_size=2, boft_n_butterfly_factor=3)), "multiple"),
        (lambda: wrapped(BOFTConfig(target_modules=["fc"], boft_block_size=3, boft_n_butterfly_factor=2)), r"\[2, 6\]"),
        (lambda: wrapped(HRAConfig(target_modules=["fc"], r=14, apply_GS=True)), "r=14"),
        (lambda: RoadConfig(variant="road_3"), "variant='road_3'"),
        (lambda: RoadConfig(group_size=7), "group_size"),
        (
            lambda: get_peft_model(
                nn.ModuleDict({"fc": nn.Conv1d(4, 12, 1, groups=2)}), RoadConfig(target_modules=["fc"], group_size=4)
            ),
            r"6 outputs of each group.*\[2, 6\]",
        ),
        (lambda: wrapped(RoadConfig(target_modules=["fc"])), "group_size=64"),
        (
            lambda: get_peft_model(nn.Sequential(nn.Linear(4, 3)), RoadConfig(target_modules=["0"])),
            "size. Exclude the layer",
        ),
        (lambda: DeloraConfig(r=0), "`r`"),
        (lambda: DeloraConfig(rank_pattern={"fc": 0}), "rank_pattern"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("fields", [{"oft_block_size": 1}, {"oft_block_size": 0, "r": 12}], ids=str)
def test_blocks_that_have_nothing_to_turn_are_told(fields):
    with pytest.warns(peft.PeftWarning, match="'fc' trains nothing"):
        wrapped(OFTConfig(target_modules=["fc"], **fields))


def test_the_norms_of_delora_are_saved_and_not_trained():
    model = wrapped(DeloraConfig(target_modules=["fc"], r=2))
    assert not any("w_norm" in n for n, _ in model.named_parameters())
    state = peft.get_peft_model_state_dict(model)
    norms = state["base_model.model.fc.delora_w_norm"]
    torch.testing.assert_close(norms, model.base_model.model.fc.base_layer.weight.norm(dim=0))
    other = get_peft_model(Net(), DeloraConfig(target_modules=["fc"], r=2))
    peft.set_peft_model_state_dict(other, state)
    assert torch.equal(other.base_model.model.fc.delora_w_norm["default"], norms)


@pytest.mark.parametrize(("count", "shape"), [(2, (2, 15)), (4, (4, 3)), (6, (6, 1))])
def test_the_number_of_blocks_is_that_of_all_groups_of_a_convolution(count, shape):
    base = nn.Sequential(nn.Conv2d(12, 4, 1, groups=2))
    model = get_peft_model(base, OFTConfig(target_modules=["0"], r=count, oft_block_size=0))
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [shape]


@pytest.mark.parametrize("features", [20, 110])
def test_a_weight_merges_to_the_same_bits_wherever_it_lies(features):
    merged = []
    for start in range(5):  # in numbers; in files tensors start at multiples of 8 bytes
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(features, 61))
        held = torch.empty(net[0].weight.numel() + start)[start:].view_as(net[0].weight)
        net[0].weight.data = held.copy_(net[0].weight.data)
        model = get_peft_model(net, OFTConfig(r=0, oft_block_size=10, target_modules=["0"]))
        with torch.no_grad():
            for p in model.base_model.model[0].adapter_parameters("default"):
                p.normal_(std=0.1)
        merged.append(model.merge_and_unload()[0].weight)
    assert all(torch.equal(merged[0], one) for one in merged)
