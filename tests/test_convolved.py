"""Convolutions large enough for the ways that small ones leave aside: one kernel W', thin factors, Kronecker parts."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.layouts import Around, Layout
from conformance.rows import METHODS, adapted, close, expected
from conformance.test_gradients import close_each, gradients, leaves
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.core import direct, recycled
from peft.kernels import convolution, masks

LARGE = {
    "broad": Layout("conv-2d-broad", lambda: Around(nn.Conv2d(128, 24, 3, padding=1)), (3, 128, 4, 4), batched=False),
    "long": Layout("conv-2d-long", lambda: Around(nn.Conv2d(8, 12, 3, stride=2)), (2, 8, 40, 40), batched=False),
    "one": Layout("conv-2d-one", lambda: Around(nn.Conv2d(160, 120, 1)), (2, 160, 9, 9), batched=False),
    "line": Layout(
        "conv-1d-circular",
        lambda: Around(nn.Conv1d(300, 20, 5, dilation=2, padding=4, padding_mode="circular")),
        (2, 300, 70),
        batched=False,
    ),
    "grouped": Layout(
        "conv-2d-large-grouped",
        lambda: Around(nn.Conv2d(96, 48, 3, groups=2)),
        (1, 96, 9, 9),
        batched=False,
        grouped=True,
    ),
}
CELLS = [(m, kind) for m, row in METHODS.items() for kind, it in LARGE.items() if row.forbidden(it) is None]
DEAR = ("frod", "osf", "psoft")  # whose formulas are written out for small layers
CELLS = [(m, kind) for m, kind in CELLS if not METHODS[m].tasks and not m.startswith(DEAR)]


@pytest.mark.parametrize("method, kind", CELLS)
def test_values_and_gradients_are_those_of_the_formulas(method, kind):
    layout = LARGE[kind]
    model = adapted(method, layout)
    x = layout.x().requires_grad_()
    inputs = [*leaves(model).values(), x]
    y, wanted = model(x), expected(model, method, layout, x)
    close(y, wanted)
    close_each(gradients(y, inputs), gradients(wanted, inputs), 5e-5)
    with torch.no_grad():
        for _ in range(2):  # the second finds what evaluation keeps
            close(model(x), wanted)


@pytest.mark.parametrize("method, kind", [cell for cell in CELLS if cell[1] in ("one", "grouped")])
@torch.no_grad()
def test_a_weight_made_in_blocks_of_rows_is_that_made_at_once(method, kind, monkeypatch):
    layout = LARGE[kind]
    model, x = adapted(method, layout).eval(), layout.x()
    wanted = model(x)
    monkeypatch.setattr(direct, "BLOCK", 700)  # which is no whole number of rows
    for _ in range(2):
        close(model(x), wanted)


class Convolutions(TorchDispatchMode):
    """How many convolutions are computed, and derivatives of such."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.aten.convolution.default
        self.backward += func is torch.ops.aten.convolution_backward.default
        return func(*args, **(kwargs or {}))


CONFIGS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=["0"], init_lora_weights=False),
    "rsLoRA": lambda: LoraConfig(r=4, use_rslora=True, target_modules=["0"], init_lora_weights=False),
    "DoRA": lambda: LoraConfig(r=4, use_dora=True, target_modules=["0"], init_lora_weights=False),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=["0"], init_weights=False),
    "LoKr": lambda: LoKrConfig(r=4, target_modules=["0"], init_weights=False),
}


def net(config, channels=16, **more):
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Conv2d(channels, 24, 3, padding=1, **more)), CONFIGS[config]())


def counted(model, x, grad=False):
    with torch.set_grad_enabled(grad), Convolutions() as seen:
        y = model(x)
        if grad:
            y.square().sum().backward()
    return seen.forward, seen.backward


@pytest.mark.parametrize("config", CONFIGS)
def test_evaluation_convolves_once(config):
    model, x = net(config).eval(), torch.randn(2, 16, 20, 20)
    assert counted(model, x) == (1, 0)


class Large(TorchDispatchMode):
    """The operations whose result is as large as a weight, by name."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if isinstance(found, torch.Tensor) and found.numel() == self.size and not views:
            self.seen.append(func.overloadpacket.__name__)
        return found


@pytest.mark.parametrize("config, passes", [("LoRA", 1), ("DoRA", 2), ("LoHa", 0), ("LoKr", 0)])
@torch.no_grad()
def test_a_large_kernel_is_made_in_few_passes_and_no_new_memory(config, passes):
    """LoHa's and LoKr's in blocks of rows."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Conv2d(256, 256, 3, padding=1) for _ in range(2)))
    model = get_peft_model(base, dataclasses.replace(CONFIGS[config](), target_modules=["0", "1"])).eval()
    x = torch.randn(2, 256, 20, 20)
    model(x)
    recycled.forget()
    with Large(256 * 256 * 9) as large:
        model(x)
    assert len(large.seen) == 2 * passes
    assert recycled.waiting() == 256 * 256 * 9 * 4  # one weight's memory has served both layers
    recycled.forget()


@pytest.mark.parametrize("features", [32, 512])
@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_a_weight_that_is_read_under_autocast_keeps_its_dtype(features, dora):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(features, 4)

    config = LoraConfig(r=4, target_modules=["a"], use_dora=dora, init_lora_weights=False)
    layer = get_peft_model(Reads(), config).eval().base_model.model.a
    W = layer.stack(("default",)).live_weight()
    with torch.autocast("cpu", torch.bfloat16):
        half = layer.stack(("default",)).live_weight()
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, W, rtol=2e-2, atol=2e-2)


def test_few_places_are_convolved_with_thin_factors():
    """As making a large matrix would take longer."""
    model, x = net("LoRA", 256).eval(), torch.randn(1, 256, 2, 2)
    assert counted(model, x) == (3, 0)
    model, x = net("LoHa", 256).eval(), torch.randn(1, 256, 2, 2)
    assert counted(model, x) == (3, 0)


def test_training_convolves_with_an_update_of_full_size_together_with_the_base():
    x = torch.randn(2, 16, 20, 20, requires_grad=True)
    assert counted(net("LoHa").train(), x, grad=True) == (1, 1)
    assert counted(net("LoKr").train(), x, grad=True) == (1, 1)


def test_training_takes_the_parts_of_a_product_where_that_is_broad():
    """Their gradients need no convolution with the whole kernel."""
    x = torch.randn(2, 256, 6, 6, requires_grad=True)
    model = net("LoKr", 256).train()
    with Convolutions() as seen:
        model(x).square().sum().backward()
    assert (seen.forward, seen.backward) == (2, 2)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def hooked_base(model, layer):
    layer.base_layer.register_forward_hook(lambda m, args, y: y * 2)


def patched_base(model, layer):
    own = layer.base_layer._conv_forward
    layer.base_layer.forward = lambda x: own(x, layer.base_layer.weight, layer.base_layer.bias) * 2


def written(model, layer):
    layer.base_layer.weight.data.mul_(2)
    layer.base_layer.bias.data.mul_(2)


class Doubled(nn.Conv2d):
    """A subclass with a product of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def other_class(model, layer):
    layer.base_layer.__class__ = Doubled


@pytest.mark.parametrize("change", [hooked_base, patched_base, written, other_class], ids=lambda f: f.__name__)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("config", ["LoRA", "LoHa", "LoKr"])
def test_what_changes_around_the_base_is_seen(config, train, change):
    model, x = net(config).train(train), torch.randn(2, 16, 20, 20)
    with torch.set_grad_enabled(train):
        y = model(x)
        with model.disable_adapter():
            base = model(x)
        change(model, model.base_model.model[0])
        torch.testing.assert_close(model(x), y + base, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hooks_on_the_factors_are_run():
    model, x = net("LoRA").eval(), torch.randn(2, 16, 20, 20)
    layer = model.base_model.model[0]
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    layer.lora_B["default"].register_forward_hook(lambda m, args, u: u * 3)
    torch.testing.assert_close(model(x), base + 3 * (y - base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_merges_copies_and_second_adapters_agree(config):
    model, x = net(config).eval(), torch.randn(2, 16, 20, 20)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    twin = copy.deepcopy(model)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(twin(x), y)
    model.add_adapter("other", CONFIGS[config]())
    model.set_adapter("other")
    other = model(x)
    mixed = model(x, adapter_names=["default", "other"])
    torch.testing.assert_close(mixed, torch.cat([y[:1], other[1:]]), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_trace_serves_other_places():
    model = net("LoRA").eval()
    traced = torch.jit.trace(model, torch.randn(1, 16, 20, 20), check_trace=False)
    x = torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_numbers_lie_as_the_base_lays_them(config, train, given):
    model, x = net(config).train(train).to(memory_format=torch.channels_last), torch.randn(2, 16, 20, 20)
    x = x.to(memory_format=torch.channels_last) if given else x
    with torch.set_grad_enabled(train):
        y = model(x)
        with model.disable_adapter():
            base = model(x)
        assert y.stride() == base.stride()
    torch.testing.assert_close(y, net(config).train(train)(x), rtol=1e-4, atol=1e-4)


WAYS = {
    "1-D": (nn.Conv1d(6, 8, 3, stride=2, padding=1), (3, 6, 11)),
    "2-D": (nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (3, 6, 9, 8)),
    "2-D grouped": (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5)),
    "3-D": (nn.Conv3d(4, 6, (1, 2, 2)), (2, 4, 2, 4, 4)),
}


def thin_inputs(way, kind=torch.float32):
    torch.manual_seed(0)
    base, shape = WAYS[way]
    x = torch.randn(shape, dtype=kind, requires_grad=True)
    A = nn.Parameter(torch.randn(4, base.in_channels // base.groups, *base.kernel_size))
    return x, A, convolution.Way(base.stride, base.padding, base.dilation, base.groups)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("wants", ["both", "x", "A"])
def test_a_thin_convolution_is_that_of_plain_operations(way, kind, p, wants, monkeypatch):
    x, A, how = thin_inputs(way, kind)
    x.requires_grad_(wants != "A")
    A.requires_grad_(wants != "x")
    mask = (torch.rand(x.shape) >= p).to(torch.uint8)
    monkeypatch.setattr(masks, "draw", lambda *_: mask.clone())
    inputs = [t for t in (x, A) if t.requires_grad]
    kept = x.to(A.dtype) * mask / (1 - p) if p < 1 else x.to(A.dtype) * 0
    wanted = getattr(nn.functional, f"conv{x.dim() - 2}d")(kept, A, None, *how)
    y = convolution.down(x, A, p, how)
    if not p and kind is torch.float32:
        assert y is None  # plain operations keep no more
        return
    torch.testing.assert_close(y, wanted)
    g = torch.randn_like(y)
    for mine, right in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-2 if kind is torch.bfloat16 else 1e-4, atol=1e-4)


def test_second_derivatives_and_several_gradients_at_once(monkeypatch):
    x, A, how = thin_inputs("2-D")
    mask = (torch.rand(x.shape) >= 0.4).to(torch.uint8)
    monkeypatch.setattr(masks, "draw", lambda *_: mask.clone())

    def plainly():
        return nn.functional.conv2d(x * mask / 0.6, A, None, *how)

    def twice(y):
        first = torch.autograd.grad(y.tanh().sum(), (x, A), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, A))

    for mine, right in zip(twice(convolution.down(x, A, 0.4, how)), twice(plainly()), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-3)
    y, wanted = convolution.down(x, A, 0.4, how), plainly()
    gs = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, (x, A), gs, is_grads_batched=True)
    for mine, right in zip(found, torch.autograd.grad(wanted, (x, A), gs, is_grads_batched=True), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def kept_bytes(model, x):
    """Of memory that is no parameter's and not x's."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), x]}
    found = {}

    def note(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t  # which holds the address
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("padding", [1, (1, 1)])
def test_dropout_and_casts_keep_bits_and_no_copies(padding):
    x = torch.randn(2, 16, 20, 20, requires_grad=True)
    thin = 4 * 2 * 4 * 20 * 20  # of what is between the factors, once, and once scaled
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=0.1)
    model = get_peft_model(nn.Sequential(nn.Conv2d(16, 24, 3, padding=padding)), config).train()
    assert kept_bytes(model, x) <= x.numel() // 8 + 2 * thin + 64
    config = LoraConfig(r=4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Conv2d(16, 24, 3, padding=padding)).bfloat16(), config).train()
    x = x.detach().bfloat16().requires_grad_()
    assert kept_bytes(model, x) <= 2 * thin + 64
    model(x).float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_dropout_keeps_its_share_of_the_input():
    """And draws anew in each forward, from torch's generator."""
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 6, 1)),
        LoraConfig(r=2, target_modules=["0"], lora_dropout=0.3, init_lora_weights=False),
    ).train()
    x = torch.ones(1, 4, 60, 60)
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first) and not torch.equal(first, second)
    torch.testing.assert_close(first.mean((2, 3)), model.eval()(x).mean((2, 3)), rtol=0.1, atol=0.1)
