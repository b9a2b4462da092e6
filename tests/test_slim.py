"""Products of which one matrix has few columns: the same numbers, whichever way round they are taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft import LoraConfig, MissConfig, get_peft_model
from peft.kernels import slim

RANKS = (1, 2, 3, 4, 7, 8, 11, 12, 16, 24, 40)
SIZES = ((0, 64), (1, 64), (31, 512), (32, 256), (128, 64), (128, 512), (300, 257))


@pytest.mark.parametrize("rows, d", SIZES)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_they_are_what_they_say(rows, d, r, dtype):
    torch.manual_seed(rows + r)
    x, A, h = torch.randn(rows, d).to(dtype), torch.randn(r, d).to(dtype), torch.randn(rows, r).to(dtype)
    B = torch.randn(d, r).to(dtype)
    near = {"rtol": 2e-2, "atol": 2e-1} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(slim.down(x, A), x @ A.mT, **near)
    torch.testing.assert_close(slim.down(x, B.mT, 0.5), 0.5 * (x @ B), **near)
    torch.testing.assert_close(slim.linear(x.view(1, rows, d), A), (x @ A.mT)[None], **near)
    for held in (h, h.mT.contiguous().mT):
        found = slim.outer(x, held, 2.0)
        torch.testing.assert_close(found, 2 * (x.mT @ h), **near)
        assert found.is_contiguous()
        torch.testing.assert_close(slim.up(held, B), h @ B.mT, **near)
        torch.testing.assert_close(slim.onto(x.clone(), held, B, 0.5), x + 0.5 * (h @ B.mT), **near)


@pytest.mark.parametrize("S, c, k", [(1, 1, 4), (8, 16, 64), (3, 64, 256), (2, 128, 512)])
@pytest.mark.parametrize("r", RANKS)
def test_several_at_once(S, c, k, r):
    torch.manual_seed(r)
    g, h, B = torch.randn(S, c, k), torch.randn(S, c, r), torch.randn(S, k, r)
    torch.testing.assert_close(slim.backs(g, B), g @ B, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slim.outers(g, h), g.mT @ h, rtol=1e-4, atol=1e-4)
    assert slim.outers(g, h).is_contiguous()


@pytest.mark.parametrize("r", [2, 8, 16])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_once_and_twice(r, rows, bias):
    torch.manual_seed(0)
    h, B, y = torch.randn(1, rows, r), torch.randn(512, r), torch.randn(rows, 512)
    b = torch.randn(512) if bias else None

    def gradients(up, onto):
        leaves = [t.clone().requires_grad_() for t in (h, B, y, *([b] if bias else []))]
        v, w, u = leaves[:3]
        out = up(v, w, leaves[3] if bias else None).square().sum() + onto(u * 1.0, v[0], w).pow(3).mean()
        once = torch.autograd.grad(out, leaves, create_graph=True)
        twice = torch.autograd.grad(sum(t.square().mean() for t in once), leaves)
        return [*once, *twice]

    for own in (True, False):
        found = gradients(slim.up, lambda u, v, w, own=own: slim.onto(u, v, w, 0.5, own))
        wanted = gradients(F.linear, lambda u, v, w: u + v @ w.mT * 0.5)
        for a, c in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, c, rtol=2e-4, atol=2e-4)


class Narrow(TorchDispatchMode):
    """The products whose result is a tall matrix of few columns, summed over many rows."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and out.shape == (512, 8):
            self.found.append(func)
        return out


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_gradient_of_B_is_summed_standing(options, frozen):
    """Which takes up to thirty times as long: at r=8, the rank that most adapters have."""
    model = get_peft_model(nn.Sequential(nn.Linear(256, 512)), LoraConfig(target_modules=["0"], r=8, **options))
    for name, parameter in model.named_parameters():
        if frozen and "lora_A" in name:
            parameter.requires_grad_(False)
    with Narrow() as mode:
        model(torch.randn(4, 64, 256, requires_grad=True)).square().mean().backward()
    assert not mode.found
    found = next(p.grad for n, p in model.named_parameters() if "lora_B" in n)
    assert found.shape == (512, 8) and found.is_contiguous()


@pytest.mark.parametrize("rows", [(0,), (2, 0), (3, 64)])
@pytest.mark.parametrize("way", [{"init_weights": "bat"}, {"init_weights": "mini", "mini_r": 8}, {}])
@pytest.mark.parametrize("grad", [False, True])
def test_outputs_of_few_features_lie_row_by_row_and_may_be_empty(rows, way, grad):
    """`logits.view(-1)` after a layer works, whichever way round the product was taken."""
    model = get_peft_model(nn.Sequential(nn.Linear(256, 24)), MissConfig(target_modules=["0"], r=8, **way))
    with torch.set_grad_enabled(grad):
        y = model(torch.randn(*rows, 256, requires_grad=True))
    assert y.shape == (*rows, 24) and y.view(-1).numel() == y.numel()
