"""Products with the bfloat16 halves of float32 factors, against float64 and against the form without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft import LoraConfig, get_peft_model
from peft.kernels import halves, thin

HALF = torch.bfloat16
N, D, K, R = 24, 40, 56, 6

UNITS = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()

pytestmark = pytest.mark.skipif(not UNITS, reason="no units that multiply bfloat16")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Halves for inputs of more than 64 elements; gives the names of the products that were asked for."""
    used: list[str] = []
    monkeypatch.setattr(thin, "ONE", 64)
    monkeypatch.setattr(halves.suit, "__defaults__", (1,))
    monkeypatch.setattr(halves, "MORE", 1)
    for name in ("onto", "product", "wide", "across"):
        whole = getattr(halves, name)
        monkeypatch.setattr(halves, name, lambda *args, name=name, whole=whole: used.append(name) or whole(*args))
    return used


def test_these_units_sum_as_they_should() -> None:
    assert halves.able()


def near(found: Tensor, exact: Tensor, bits: int) -> None:
    assert (found.double() - exact).abs().max() < 2.0**-bits * exact.abs().max()


@pytest.mark.parametrize("scale", (1.0, -0.75))
def test_every_product_has_the_bits_that_it_is_said_to_have(always: list[str], scale: float) -> None:
    torch.manual_seed(0)
    x, g, y = (torch.randn(N, width).to(HALF) for width in (D, K, K))
    A, B = torch.randn(R, D), torch.randn(K, R)
    h, bits = thin.down(x, A, 0.0)
    assert bits is None and h.dtype is torch.float32
    near(h, x.double() @ A.double().T, 14)
    before, exact = y.clone(), y.double() + scale * h.double() @ B.double().T
    for own in (False, True):
        found = thin.onto(y, h, B, scale, own)
        assert (found is y) == own and (own or torch.equal(y, before))
        near(found, exact, 8)
        assert (found != exact.to(HALF)).double().mean() < 0.02  # but for ties, it is rounded once
    back, of_B = thin.of_h(g, B, h, scale)
    near(back, scale * g.double() @ B.double(), 14)
    near(of_B, scale * g.double().T @ h.double(), 14)
    of_x, of_A = thin.of_x(back, x, None, A, HALF)
    near(of_x, back.double() @ A.double(), 8)
    near(of_A, back.double().T @ x.double(), 14)
    assert of_x.dtype is HALF and of_A.shape == A.shape and of_B.shape == B.shape
    assert thin.of_x(back, None, None, A, HALF)[1] is None and thin.of_x(back, x, None, A, None)[0] is None
    assert thin.of_h(g, B, None, scale)[1] is None


def test_sizes_decide() -> None:
    A = torch.empty(1)
    assert halves.suit(halves.MANY, HALF, A) and not halves.suit(halves.MANY - 1, HALF, A)
    assert not halves.suit(halves.MANY, HALF, A, halves.MORE)
    assert not halves.suit(halves.MORE, torch.float16, A) and not halves.suit(halves.MORE, HALF, A.double())


def test_transposes_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    h, t = torch.randn(N, R), torch.randn(R, K)
    exact = h.double() @ t.double()
    for one in (h, h.T.contiguous().T):
        for two in (t, t.T.contiguous().T):
            near(halves.product(one, two), exact, 8)
            near(halves.wide(exact.to(HALF), two.T), exact.to(HALF).double() @ t.double().T, 14)


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D, K, dtype=HALF))
    return get_peft_model(base, LoraConfig(r=R, target_modules=["0"], init_lora_weights=False, **options))


def step(model: Any, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.float().sin().sum(), wanted)]


@pytest.mark.parametrize("options", ({}, {"lora_dropout": 0.25}, {"use_dora": True}, {"init_lora_weights": "pissa"}))
def test_a_step_is_that_of_casts(options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    options = dict(options)
    start = options.pop("init_lora_weights", False)
    model = adapted(**options).train()
    if start:
        config = LoraConfig(r=R, target_modules=["0"], init_lora_weights=start)
        model = get_peft_model(nn.Sequential(nn.Linear(D, K, dtype=HALF)), config).train()
    x = torch.randn(2, N, D, dtype=HALF)
    with pytest.MonkeyPatch.context() as without:
        without.setattr(halves, "able", lambda: False)
        expected = step(model, x)
    used = request.getfixturevalue("always")
    for found, other in zip(step(model, x), expected, strict=True):
        assert found.dtype is other.dtype and found.shape == other.shape
        torch.testing.assert_close(found.double(), other.double(), rtol=0.02, atol=0.02 * other.abs().max().item())
    if not options and not start:
        assert sorted(used) == ["across", "across", "onto", "product", "wide", "wide"]
    elif "lora_dropout" in options:
        assert "onto" in used


def test_evaluation_has_the_bits_of_training(always: list[str]) -> None:
    model, x = adapted(), torch.randn(N, D, dtype=HALF)
    trained = model.train()(x).detach()
    with torch.no_grad():
        assert torch.equal(trained, model.eval()(x))


def test_what_is_not_finite_stays_in_its_rows(always: list[str]) -> None:
    x, A, B = torch.randn(N, D).to(HALF), torch.randn(R, D), torch.randn(K, R)
    x[3, 5] = torch.inf
    h, _ = thin.down(x, A, 0.0)
    y = thin.onto(torch.randn(N, K).to(HALF), h, B, 1.0, True)
    broken = torch.arange(N) == 3
    assert torch.equal(~h.isfinite().all(1), broken) and torch.equal(~y.isfinite().all(1), broken)
