"""The products of an update on a CPU, one by one and in blocks: what the plain form gives, in few operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.subjects.algebra import counted
from peft import LoraConfig, get_peft_model
from peft.kernels import lowrank, masks, thin

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "wide": (torch.float32, torch.float64),
}
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FORMS = {
    "linear": lambda x, W, b, A, B, p: lowrank.linear(x, W, b, A, B, 0.7, p),
    "add": lambda x, W, b, A, B, p: lowrank.add(F.linear(x, W, b), x, A, B, 0.7, p),
}


def tensors(dtype, wide, shape=(3, 13), d=24, k=40, r=4):
    """x, W, b, A, B; the rows of x are no multiple of a block's."""
    torch.manual_seed(0)
    x, W, b = (torch.randn(*s).to(dtype) for s in ((*shape, d), (k, d), (k,)))
    A, B = torch.randn(r, d, dtype=wide) / 5, torch.randn(k, r, dtype=wide) / 2
    return x.requires_grad_(), W / 5, b, A.requires_grad_(), B.requires_grad_()


def run(form, held, p, wanted):
    """The output and the gradients of those that want one."""
    torch.manual_seed(1)
    y = form(*held, p)
    return [y, *torch.autograd.grad(y.double().tanh().sum(), wanted)]


@pytest.mark.parametrize("block", [None, 24 * 16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kinds", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", ["", "x", "A", "B", "xA", "xB"])
def test_values_and_gradients_are_those_of_the_plain_form(form, kinds, p, block, frozen, monkeypatch):
    dtype, wide = DTYPES[kinds]
    held = tensors(dtype, wide)
    if block:
        monkeypatch.setattr(thin, "BLOCK", block)
        monkeypatch.setattr(thin, "ONE", block)
    named = dict(zip("xWbAB", held, strict=True))
    for name in frozen:
        named[name].requires_grad_(False)
    wanted = [t for t in held if t.requires_grad]
    found = run(FORMS[form], held, p, wanted)
    plain = run(lambda x, W, b, A, B, p: lowrank.plain(F.linear(x, W, b), x, A, B, 0.7, p), held, p, wanted)
    for one, other in zip(found, plain, strict=True):
        assert one.dtype is other.dtype
        assert (one - other).abs().max() <= CLOSE[dtype] * other.abs().max().clamp_min(1)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)])
def test_any_number_of_dimensions_and_a_learning_bias(shape):
    x, W, b, A, B = tensors(torch.float64, torch.float64, shape)
    b.requires_grad_()
    found = run(FORMS["linear"], (x, W, b, A, B), 0.0, [x, b, A, B])
    plain = run(
        lambda x, W, b, A, B, p: lowrank.plain(F.linear(x, W, b), x, A, B, 0.7), (x, W, b, A, B), 0.0, [x, b, A, B]
    )
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (3, 0)])
def test_an_input_without_numbers_gives_an_output_of_its_shape(shape, gradients):
    x, W, b, A, B = tensors(torch.float32, torch.float32, shape[:-1], shape[-1], 5, 2)
    with torch.set_grad_enabled(gradients):
        for p in (0.0, 0.3):
            y = lowrank.linear(x, W, b, A, B, 0.7, p)
            assert torch.equal(y, F.linear(x, W, b))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [0, 7])
def test_derivatives_of_any_order(rows, p):
    x, W, b, A, B = tensors(torch.float64, torch.float64, (rows,), 6, 5, 2)

    def form(x, A, B):
        torch.manual_seed(2)
        return lowrank.linear(x, W, b, A, B, 0.7, p)

    assert not rows or torch.autograd.gradcheck(form, (x, A, B))
    assert not rows or torch.autograd.gradgradcheck(form, (x, A, B))
    assert form(x, A, B).shape == (rows, 5)


def test_masks_are_drawn_in_blocks_as_at_once(monkeypatch):
    x, _, _, A, _ = tensors(torch.float32, torch.float32, (50,))
    torch.manual_seed(4)
    mask = masks.draw(x.shape, 0.4, x.device)
    for block in (24 * 8, 2**17):
        monkeypatch.setattr(thin, "BLOCK", block)
        monkeypatch.setattr(thin, "ONE", block)
        torch.manual_seed(4)
        h, bits = thin.down(x.detach(), A.detach(), 0.4)
        drawn = masks.of_bits(bits, x.shape, torch.uint8) if x.numel() > block else masks.unpacked(bits, x.shape)
        assert torch.equal(drawn, mask)
        torch.testing.assert_close(h, F.linear(x * mask, A))


@pytest.mark.parametrize(("r", "backward"), [(16, 4), (8, 5)])  # the fifth lays out a gradient that was summed lying
def test_a_training_step_has_six_operations_more_than_the_base(r, backward):
    def layer():
        return nn.Linear(512, 512, bias=False).requires_grad_(False)

    model = get_peft_model(nn.Sequential(layer()), LoraConfig(target_modules=["0"], r=r, init_lora_weights=False))
    more = {key: value - counted(layer())[key] for key, value in counted(model.base_model.model[0]).items()}
    assert more == {"evaluation": 2, "forward": 2, "backward": backward}


@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_operations_alone():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 8)
    traced = torch.jit.trace(model, (x,))
    assert "PythonOp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))


AUTOCAST = [(torch.bfloat16, 0.0), (torch.bfloat16, 0.4), (torch.float32, 0.0), (torch.float32, 0.4)]


def under_autocast(kind: torch.dtype, p: float, rows: tuple[int, ...] = (3, 40)) -> Any:
    """A layer of this dtype under LoRA in float32, an input, its output under autocast, and what is kept for it."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_dropout=p)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 96, dtype=kind)), config).train()
    x, kept = torch.randn(*rows, 64, dtype=kind, requires_grad=True), []
    torch.manual_seed(1)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keep, torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    return model, x, y, kept


@pytest.mark.parametrize("rows", [(5,), (1, 1), (3, 40), (0, 2)], ids=str)
@pytest.mark.parametrize("kind, p", AUTOCAST, ids=str)
def test_under_autocast_values_and_gradients_are_those_of_the_formula(kind, p, rows):
    model, x, y, _ = under_autocast(kind, p, rows)
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert y.dtype is torch.bfloat16 and y.shape == (*rows, 96)
    if p and rows != (0, 2):  # where the input was kept, its gradient through A is not the base's
        return
    wanted = (x.double() @ (layer.weight.double() + 2 * B.double() @ A.double()).mT) + layer.bias.double()
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, A, B], g)
    for one, two in zip([y, *found], [wanted, *torch.autograd.grad(wanted, [x, A, B], g.double())], strict=True):
        largest = max(two.detach().abs().flatten().tolist(), default=0.0)
        torch.testing.assert_close(one.double(), two.double(), rtol=0.03, atol=0.03 * largest)


def test_under_autocast_dropout_is_that_of_training_without():
    model, x, y, _ = under_autocast(torch.bfloat16, 0.4)
    torch.manual_seed(1)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind, p", AUTOCAST, ids=str)
def test_under_autocast_little_is_kept(kind, p):
    """The input as products take it, the weight so too, rank-sized tensors, and a bit of a mask for an element."""
    _, x, _, kept = under_autocast(kind, p, (512,))
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    W, of_rank = 2 * 64 * 96, 4 * (64 + 96 + 512) * 4
    assert sum(sizes.values()) <= 2 * x.numel() + W + of_rank + (x.numel() // 8 if p else 0)
