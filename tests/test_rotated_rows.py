"""Rows turned by learnt rotations as one node of the graph: what the definition gives, and where it stands back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from peft import OFTConfig, get_peft_model
from peft.kernels import rotations

TERMS = {"series": 5, "exact": 0}
each = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)


def tensors(n=3, b=16, rows=(2, 5), size=0.3):
    """t and what is learnt."""
    torch.manual_seed(0)
    held = torch.randn(n, b * (b - 1) // 2, dtype=torch.float64) * size
    return torch.randn(*rows, n * b, dtype=torch.float64, requires_grad=True), held.requires_grad_()


@each
@pytest.mark.parametrize("frozen", ["", "t", "held"])
@pytest.mark.parametrize(("n", "b", "size"), [(1, 16, 0.1), (3, 17, 0.3), (2, 32, 30.0)])
def test_values_and_gradients_are_those_of_the_definition(terms, frozen, n, b, size):
    t, held = tensors(n, b, size=size)
    t.requires_grad_(frozen != "t"), held.requires_grad_(frozen != "held")
    wanted = [one for one in (t, held) if one.requires_grad]
    found, plain = rotations.turned(t, held, b, terms), rotations.plain(t, held, b, terms)
    torch.testing.assert_close(found, plain)
    for one, other in zip(*(torch.autograd.grad(y.tanh().sum(), wanted) for y in (found, plain)), strict=True):
        torch.testing.assert_close(one, other)


@each
def test_derivatives_of_any_order(terms):
    held = tensors(1, 16, (3,))
    form = lambda *t: rotations.turned(*t, 16, terms)  # noqa: E731
    assert torch.autograd.gradcheck(form, held, fast_mode=True)
    assert torch.autograd.gradgradcheck(form, held, fast_mode=True)


def test_it_stands_back_where_other_operations_are_due():
    t, held = tensors()
    assert rotations.turned(t, held, 16, 5) is not None
    assert rotations.turned(t, held, 16, 4) is None
    assert rotations.turned(t.float(), held, 16, 5) is None
    assert rotations.turned(*tensors(3, 8), 8, 5) is None
    assert rotations.turned(t, held[:1], 16, 5) is None  # one block for all
    with torch.no_grad():
        assert rotations.turned(t, held, 16, 5) is None
    with torch.autocast("cpu"):
        assert rotations.turned(t, held, 16, 5) is None
    with forward_ad.dual_level():
        assert rotations.turned(t, held, 16, 5) is None
    seen = []
    torch.func.vmap(lambda t: seen.append(rotations.turned(t, held, 16, 5)) or t)(t[None])
    assert seen == [None]


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({}, True),
        ({"use_cayley_neumann": False}, True),
        ({"num_cayley_neumann_terms": 3}, False),
        ({"block_share": True}, False),
        ({"coft": True}, False),
    ],
)
def test_a_layer_takes_it_in_training(fields, taken):
    torch.manual_seed(0)
    config = OFTConfig(target_modules=["0"], oft_block_size=16, init_weights=False, **fields)
    model = get_peft_model(nn.Sequential(nn.Linear(48, 24, bias=False)), config)
    x = torch.randn(40, 48)
    y = model(x)
    seen, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        seen.add(type(node).__name__)
        left += [n for n, _ in node.next_functions if n is not None]
    assert ("_TurnedBackward" in seen) is taken
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(y, model.merge_and_unload()(x), rtol=1e-4, atol=1e-5)
