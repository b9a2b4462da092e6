"""Masks of dropout: their rate, their memory, and one draw for the fused and the plain form."""

from __future__ import annotations

import pytest
import torch

from peft.kernels import lowrank, masks

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 129), (0, 4)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_a_packed_mask_comes_back(shape, p):
    mask = masks.draw(shape, p, CPU)
    bits = masks.bits(mask)
    assert bits.numel() == -(-mask.numel() // 8)
    torch.testing.assert_close(masks.of_bits(bits, shape, torch.uint8), mask)
    torch.testing.assert_close(masks.unpacked(masks.packed(mask), shape), mask)


def test_a_mask_is_packed_where_that_is_worth_it():
    for rows, least in ((8, 512), (64, 4096), (65, 520)):
        mask = masks.draw((rows, 64), 0.3, CPU)
        held = masks.packed(mask)
        assert held.numel() == least
        torch.testing.assert_close(masks.unpacked(held, mask.shape, torch.float32), mask.float())


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_rate_is_what_was_asked_for_everywhere(p):
    torch.manual_seed(0)
    mask = masks.draw((1024, 1024), p, CPU)
    bound = 5 * (p * (1 - p)) ** 0.5
    assert set(mask.unique().tolist()) == {0, 1}
    assert abs(mask.double().mean().item() - (1 - p)) < bound / 1024
    lanes = mask.view(-1, 4).double().mean(0)  # four elements share one random number of 64 bits
    assert (lanes - (1 - p)).abs().max() < bound / 512
    pairs = torch.corrcoef(mask.view(-1, 4).double().T) - torch.eye(4)
    assert pairs.abs().max() < 5 / 512


@pytest.mark.parametrize("p", [0.0, 1e-6, 1.0 - 1e-6, 1.0])
def test_rates_at_the_ends(p):
    x = torch.randn(64, 64)
    y = masks.dropout(x, p)
    assert y.shape == x.shape
    assert y.isfinite().all()
    kept = int((y != 0).sum())
    assert kept > 4000 if p < 0.5 else kept < 100


def test_a_seed_tells_the_draw_and_every_draw_is_another():
    torch.manual_seed(3)
    first, second = masks.draw((64, 64), 0.5, CPU), masks.draw((64, 64), 0.5, CPU)
    torch.manual_seed(3)
    assert torch.equal(masks.draw((64, 64), 0.5, CPU), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_and_plain_forms_drop_the_same(dtype):
    x, W = torch.randn(6, 5, 16).to(dtype), torch.randn(12, 16).to(dtype)
    A, B = torch.randn(3, 16, requires_grad=True), torch.randn(12, 3, requires_grad=True)
    y = torch.nn.functional.linear(x, W)
    results = []
    for run in (
        lambda: lowrank.linear(x, W, None, A, B, 2.0, 0.4),
        lambda: lowrank.add(y, x, A, B, 2.0, 0.4),
        lambda: lowrank.plain(y, x, A, B, 2.0, 0.4),
    ):
        torch.manual_seed(5)
        out = run()
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (A, B))))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 1.0}
    for other in results[:2]:
        for found, wanted in zip(other, results[2], strict=True):
            torch.testing.assert_close(found, wanted, **tolerance)


def test_dropout_of_a_graph_is_torchs():
    compiled = torch.compile(lambda x: masks.dropout(x, 0.5), backend="eager", fullgraph=True)
    x = torch.ones(64, 64)
    torch.manual_seed(0)
    found = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, torch.nn.functional.dropout(x, 0.5))
