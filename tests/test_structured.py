"""Structured updates that keep little: circulant blocks, Kronecker and element-wise products, and their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft import C3AConfig, LoHaConfig, LoKrConfig, TinyLoraConfig, VeraConfig, get_peft_model
from peft.kernels import circulant, kron, product


def dense(K: Tensor) -> Tensor:
    """The matrix, (u b, v b), element by element."""
    u, v, b = K.shape
    step = torch.arange(b)
    turned = K[..., (step - step[:, None]) % b]  # (u, v, i, j)
    return turned.permute(0, 2, 1, 3).reshape(u * b, v * b)


@pytest.mark.parametrize("block", [1, 2, 5, 8])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3)])
@pytest.mark.parametrize("frozen", ["", "x", "K"])
def test_values_and_gradients_are_those_of_the_matrix(block: int, rows, frozen: str) -> None:
    torch.manual_seed(0)
    x, K = torch.randn(*rows, 3 * block, dtype=torch.float64), torch.randn(2, 3, block, dtype=torch.float64)
    held = [t.requires_grad_(name not in frozen) for t, name in zip((x, K), ("x", "K"), strict=True)]
    wanted = [t for t in held if t.requires_grad]
    found, plain = circulant.product(x, K, 0.3), x @ dense(K).T * 0.3
    torch.testing.assert_close(found, plain)
    for one, other in zip(*(torch.autograd.grad(y.tanh().sum(), wanted) for y in (found, plain)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("block", [1, 4, 5])
def test_circulant_derivatives_of_any_order(block: int) -> None:
    torch.manual_seed(0)
    x, K = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2 * block), (2, 2, block)))
    form = lambda x, K: circulant.product(x, K, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(form, (x, K))
    assert torch.autograd.gradgradcheck(form, (x, K))
    along = torch.func.jvp(form, (x, K), (x, K))[1]
    torch.testing.assert_close(along, 2 * form(x, K))  # bilinear


def test_a_product_of_two_low_rank_matrices_and_its_derivatives() -> None:
    torch.manual_seed(0)
    shapes = (3, 5, 2), (3, 2, 4), (3, 5, 2), (3, 2, 4)
    factors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    a1, b1, a2, b2 = factors
    torch.testing.assert_close(product.hadamard(*factors), (a1 @ b1) * (a2 @ b2))
    assert torch.autograd.gradcheck(product.hadamard, factors, fast_mode=True)
    assert torch.autograd.gradgradcheck(product.hadamard, factors, fast_mode=True)
    assert torch.func.vmap(product.hadamard)(*(t.detach()[None] for t in factors)).shape == (1, 3, 5, 4)


def test_a_kronecker_product_and_its_derivatives() -> None:
    torch.manual_seed(0)
    shapes = (2, 3, 8), (2, 3, 15), (4, 3), (2, 5)
    y, x, W1, W2 = held = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    found = kron.add(*held, 0.4)
    assert "_Add" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, y + x @ torch.kron(W1, W2).T * 0.4)
    form = lambda *held: kron.add(*held, 0.4)  # noqa: E731
    assert torch.autograd.gradcheck(form, held)
    assert torch.autograd.gradgradcheck(form, held, fast_mode=True)
    torch.testing.assert_close(kron.plain(*held, 0.4), found)
    for frozen in range(4):
        some = [t.detach() if i == frozen else t for i, t in enumerate(held)]
        wanted = [t for t in some if t.requires_grad]
        pairs = (
            torch.autograd.grad(form(*some).tanh().sum(), wanted) for form in (form, lambda *t: kron.plain(*t, 0.4))
        )
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other)


def kept(config, width: int, rows: int) -> int:
    """Bytes that a layer keeps beside its own tensors, one of several that follow each other."""
    names = list("012")
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(*[nn.Linear(width, width) for _ in names]), config).train()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = model(torch.randn(rows, width, requires_grad=True))
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    del y
    return sum(size for place, size in found.items() if place not in own) // len(names)


CASES = {
    "a vector after a frozen B: its output": (VeraConfig(r=4, target_modules=list("012")), 1.0),
    "kernels: the input, no transforms": (C3AConfig(block_size=8, target_modules=list("012")), 1.0),
    "two small products: the input, nothing between": (LoKrConfig(r=32, target_modules=list("012")), 1.0),
    "a frozen A: nothing of the input's size": (TinyLoraConfig(target_modules=list("012")), 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_kept_where_gradients_need_them_alone(case: str) -> None:
    config, times = CASES[case]
    size = 256 * 64 * 4
    assert times * size <= kept(config, 64, 256) < (times + 0.3) * size


def test_factors_are_kept_in_place_of_the_halves() -> None:
    config = LoHaConfig(r=8, alpha=8, target_modules=list("012"), rank_dropout=0.1)
    weight, inputs = 64 * 64 * 4, 16 * 64 * 4
    assert kept(config, 64, 16) < 1.1 * weight + inputs
