"""Pairs turned in a product with a block-diagonal matrix: what the definition gives, and where it stands back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from peft import RoadConfig, get_peft_model
from peft.kernels import pairs


def tensors(each, half, groups, rows=(2, 17), dtype=torch.float64):
    """y, theta and alpha."""
    torch.manual_seed(0)
    k = 2 * half * groups
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((*rows, k), (k * each // 2,), (k * each // 2,))]


@pytest.mark.parametrize("frozen", ["", "y", "theta", "alpha", "both"])
@pytest.mark.parametrize(("half", "groups"), [(1, 12), (1, 7), (3, 10), (8, 6), (16, 3), (32, 2)])
@pytest.mark.parametrize("each", [1, 2, 4])
def test_values_and_gradients_are_those_of_the_definition(each, half, groups, frozen):
    held = tensors(each, half, groups)
    for t, name in zip(held, ("y", "theta", "alpha"), strict=True):
        t.requires_grad_(not (name == frozen or (frozen == "both" and name != "y")))
    wanted = [t for t in held if t.requires_grad]
    found, plain = pairs.turned(*held, half, each), pairs.plain(*held, half, each)
    torch.testing.assert_close(found, plain)
    for one, other in zip(*(torch.autograd.grad(y.tanh().sum(), wanted) for y in (found, plain)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("each", [1, 2, 4])
def test_derivatives_of_any_order(each):
    held = tensors(each, 2, 2, (32,))
    form = lambda *t: pairs.turned(*t, 2, each)  # noqa: E731
    assert torch.autograd.gradcheck(form, held, fast_mode=True)
    assert torch.autograd.gradgradcheck(form, held, fast_mode=True)


def test_it_stands_back_where_other_operations_are_due():
    held = tensors(1, 4, 3)
    assert pairs.turned(*held, 4, 1) is not None
    assert pairs.turned(held[0][:1], *held[1:], 4, 1) is None  # few rows
    assert pairs.turned(held[0].float(), *held[1:], 4, 1) is None
    assert pairs.turned(*tensors(1, 64, 2), 64, 1) is None
    with torch.no_grad():
        assert pairs.turned(*held, 4, 1) is None
    with torch.autocast("cpu"):
        assert pairs.turned(*held, 4, 1) is None
    with forward_ad.dual_level():
        assert pairs.turned(*held, 4, 1) is None
    seen = []
    torch.func.vmap(lambda t: seen.append(pairs.turned(t, *held[1:], 4, 1)) or t)(held[0][None])
    assert seen == [None]


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_a_layer_takes_it_in_training(variant):
    torch.manual_seed(0)
    config = RoadConfig(target_modules=["0"], variant=variant, group_size=8, init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 24)), config)
    x = torch.randn(40, 16)
    y = model(x)
    assert "_Turned" in type(y.grad_fn).__name__
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(y, model.merge_and_unload()(x))
