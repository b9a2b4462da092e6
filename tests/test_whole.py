"""Many rows: the update is summed into the weight for the product, with the numbers of the sum into each row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft
from peft import LoraConfig, get_peft_model
from peft.kernels import whole

D, K = 8, 12


class Operations(TorchDispatchMode):
    """Counts sums of a matrix and a product of the weight's shape."""

    def __init__(self):
        super().__init__()
        self.summed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # with 64 rows nothing else has the weight's shape
        self.summed += func in (torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default) and out.shape == (K, D)
        return out


def adapted(bias, dtype=torch.float64, r=4, **options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D, K, bias=bias), nn.Tanh())
    model = get_peft_model(base, LoraConfig(r=r, target_modules=["0"], init_lora_weights=False, **options))
    return model.to(dtype)


def answers(model, x, train):
    """The output, and with training the gradient of everything that has one."""
    model.train(train)
    with torch.set_grad_enabled(train):
        y = model(x)
    if not train:
        return [y]
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), wanted)]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"r": 40}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("shape", [(64, D), (4, 16, D)])
def test_both_forms_give_the_same(monkeypatch, shape, options, bias, train):
    model = adapted(bias, **options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with Operations() as seen:
        found = answers(model, x, train)
    # DoRA's own norm has a product of the weight's number of rows and the rank, not of its shape
    assert seen.summed == (2 if train else 1)
    monkeypatch.setattr(whole, "reach", lambda *args: math.inf)
    with Operations() as seen:
        wanted = answers(model, x, train)
    assert seen.summed == 0
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_gradients_are_differentiated_again(monkeypatch, options):
    model = adapted(True, **options).train()
    x = torch.randn(64, D, dtype=torch.float64, requires_grad=True)

    def second():
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [p for p in model.parameters() if p.requires_grad])

    found = second()
    monkeypatch.setattr(whole, "reach", lambda *args: math.inf)
    for one, two in zip(found, second(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
        assert one.abs().max() > 0


@pytest.mark.parametrize("case", ["few rows", "16-bit weight", "dropout", "autocast", "a graph", "vmap"])
def test_elsewhere_each_row_is_summed(monkeypatch, case):
    model = adapted(True, torch.float32, **({"lora_dropout": 0.5} if case == "dropout" else {}))
    if case == "16-bit weight":
        model.base_model.model[0].base_layer.to(torch.bfloat16)
    x = torch.randn(2 if case == "few rows" else 64, D)
    x = x.bfloat16() if case == "16-bit weight" else x
    model.train(case == "dropout")
    monkeypatch.setattr(whole, "weight", None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        if case == "a graph":
            y = torch.compile(model, backend="eager", fullgraph=True)(x)
        else:
            y = torch.vmap(model)(x[None])[0] if case == "vmap" else model(x)
    assert y.shape == (len(x), K)


@pytest.mark.parametrize("rows", [2, 9, 13, 15, 64])
@pytest.mark.parametrize("r", [4, 40])
def test_training_gives_the_bits_of_evaluation(rows, r):
    """Losses of a policy against itself are differences between the two."""
    model = adapted(True, torch.float32, r=r).train()
    x = torch.randn(rows, D)
    y = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), y) and torch.equal(model.eval()(x), y)
    model.requires_grad_(False)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("train", [False, True])
def test_an_update_of_zero_leaves_the_bits_of_the_base(train):
    model = adapted(True, torch.float32).train(train)
    torch.nn.init.zeros_(model.base_model.model[0].lora_B["default"].weight)
    for rows in (2, 15, 64):
        x = torch.randn(rows, D)
        y = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), y)


def test_a_small_update_is_not_lost():
    """Where it is smaller than half of a unit in the last place of a 16-bit weight."""
    model = adapted(False, torch.float32)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.copy_(torch.eye(4, D)[[0, 0, 0, 0]])
        layer.lora_B["default"].weight.fill_(2e-4)
        layer.base_layer.to(torch.bfloat16)
        x = torch.zeros(64, D, dtype=torch.bfloat16)
        x[:, 0], x[:, 1] = 1.0, -1.0  # of which the base makes 0
        y = layer(x)
    assert whole.serves(64, D + K, layer.base_layer.weight.float(), layer.lora_A["default"].weight)
    assert torch.equal(y, torch.full((64, K), 4 * 2e-4 * 2, dtype=torch.bfloat16))


def test_the_sum_is_no_larger_than_two_thirds_of_input_and_output():
    for d, k in ((D, K), (512, 2048), (4096, 4096)):
        W = torch.empty(k, d)
        for r in (4, 64):
            rows = next(n for n in range(1, 10**5) if whole.serves(n, d + k, W, torch.empty(r, 0)))
            assert W.numel() <= rows * (d + k) * 2 / 3


class Products(TorchDispatchMode):
    """The forms of the results of all products."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.found.append(tuple(out.shape))
        return out


SUMMED = {
    "VeRA": peft.VeraConfig(r=4, target_modules=["0"], init_weights=False),
    "MiSS": peft.MissConfig(r=5, target_modules=["0"], init_weights=False),
    "MiSS, mini": peft.MissConfig(r=4, mini_r=6, target_modules=["0"], init_weights="mini"),
    "C3A": peft.C3AConfig(block_size=6, target_modules=["0"], init_weights=False),
    "FRoD": peft.FrodConfig(target_modules=["0"], init_weights=False),
}


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("bias", [False, True])
def test_evaluation_of_many_rows_is_one_product_with_the_whole_weight(name, bias):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 36, bias=bias)), SUMMED[name]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    x = torch.randn(10, 80, 24)
    with torch.no_grad():
        few = torch.stack([model(row[:2]) for row in x])
        with Products() as seen:
            many = model(x)
        torch.testing.assert_close(many[:, :2], few, rtol=1e-4, atol=1e-5)
    assert [form[0] for form in seen.found if form[0] >= 800] == [800]
    torch.testing.assert_close(model(x.requires_grad_()), many, rtol=1e-4, atol=1e-5)  # as training does it
    model.merge_adapter()
    torch.testing.assert_close(model(x).detach(), many, rtol=1e-4, atol=1e-5)


def test_a_small_update_of_a_bfloat16_weight_is_not_forgotten():
    """Which W + D would do, where D is less than half a unit in the last place of W."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    model = get_peft_model(base, peft.ShiraConfig(r=4, target_modules=["0"], init_weights=False))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.shira_weight["default"].data.fill_(2.0**-9)
        x = torch.zeros(40, 64, dtype=torch.bfloat16)
        x[:, 0::2], x[:, 1::2] = 1.0, -1.0  # of which the base makes 0
        D = layer.get_delta_weight("default").float()
        assert torch.equal(model(x).float(), x.float() @ D.T) and model(x).abs().max() > 0
