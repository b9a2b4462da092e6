"""Frozen matrices with learnt vectors in one node of the graph: what the definition gives, and where it stands back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft import VeraConfig, get_peft_model
from peft.kernels import vectors


def tensors(rows=(2, 5), d=8, k=6, r=4):
    """x, W, b, A, u, B, v; the matrices are parts of larger ones."""
    torch.manual_seed(0)
    shapes = ((*rows, d), (k, d), (k,), (r + 1, d + 2), (r,), (k + 3, r + 1), (k,))
    x, W, b, A, u, B, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return x.requires_grad_(), W, b.requires_grad_(), A[:r, :d], u.requires_grad_(), B[:k, :r], v.requires_grad_()


def formula(x, W, b, A, u, B, v):
    return F.linear(x, W + v[:, None] * B @ (u[:, None] * A), b)


@pytest.mark.parametrize("frozen", ["", "x", "b", "u", "v", "xb", "uv"])
@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (0,)])
def test_values_and_gradients_are_those_of_the_definition(frozen, rows):
    held = tensors(rows if rows else (1,))
    for t, name in zip(held, "xWbAuBv", strict=True):
        if name in frozen:
            t.requires_grad_(False)
    wanted = [t for t in held if t.requires_grad]
    found, plain = vectors.linear(*held), formula(*held)
    assert "_Linear" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, plain)
    for one, other in zip(*(torch.autograd.grad(y.tanh().sum(), wanted) for y in (found, plain)), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_may_be_asked_for_again():
    held = tensors()
    y, wanted = vectors.linear(*held), [held[i] for i in (0, 2, 4, 6)]
    g = torch.randn_like(y)
    first, again = (torch.autograd.grad(y, wanted, g, retain_graph=True) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_derivatives_of_any_order():
    x, W, b, A, u, B, v = tensors()
    form = lambda x, b, u, v: vectors.linear(x, W, b, A, u, B, v)  # noqa: E731
    assert torch.autograd.gradcheck(form, (x, b, u, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(form, (x, b, u, v), fast_mode=True)


def test_it_stands_back_where_other_operations_are_due():
    held = tensors()
    node = lambda held: type(vectors.linear(*held).grad_fn).__name__  # noqa: E731
    assert "_Linear" in node(held)
    assert "_Linear" not in node([held[0], held[1].clone().requires_grad_(), *held[2:]])
    with torch.no_grad():
        torch.testing.assert_close(vectors.linear(*held), formula(*held))
    _, along = torch.func.jvp(lambda x: vectors.linear(x, *held[1:]), (held[0],), (torch.ones_like(held[0]),))
    _, wanted = torch.func.jvp(lambda x: formula(x, *held[1:]), (held[0],), (torch.ones_like(held[0]),))
    torch.testing.assert_close(along, wanted)


def test_an_update_of_another_dtype_is_rounded_at_last():
    held = [t.detach().float() for t in tensors()]
    x, W, b = (t.bfloat16() for t in held[:3])
    y = vectors.linear(x, W, b, *held[3:])
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), formula(x.float(), W.float(), b.float(), *held[3:]), rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_layer_takes_it_in_training(rate):
    torch.manual_seed(0)
    config = VeraConfig(target_modules=["0"], r=8, vera_dropout=rate, init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 24)), config)
    y = model(torch.randn(5, 16))
    node = y.grad_fn.next_functions[0][0] if "View" in type(y.grad_fn).__name__ else y.grad_fn
    assert ("_Linear" in type(node).__name__) is (rate == 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,), (0,)])
@torch.no_grad()
def test_a_single_row_has_the_bases_bits_where_nothing_is_added(rows, bias):
    x, W, b, A, u, B, v = tensors(rows)
    b = b if bias else None
    torch.testing.assert_close(vectors.linear(x, W, b, A, u, B, v), formula(x, W, b, A, u, B, v))
    assert torch.equal(vectors.linear(x, W, b, A, u, B, v * 0), F.linear(x, W, b))


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_trace_of_a_single_row_serves_others():
    _, W, b, A, u, B, v = (t.detach() for t in tensors())
    traced = torch.jit.trace(
        lambda x: vectors.linear(x, W, b, A, u, B, v), torch.ones(1, 8).double(), check_trace=False
    )
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(traced(x), formula(x, W, b, A, u, B, v))
