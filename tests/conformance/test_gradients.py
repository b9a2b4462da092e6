"""Gradients of every method on every layout, with and without dropout, against the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .layouts import LAYOUTS
from .rows import FEW, METHODS, SEVERAL, adapted, cells, close, expected, tuner_layers

RATE = 0.4
FEW_BUT_BIAS = tuple(m for m in FEW if m != "lora-bias")


def smooth(layout):
    """Not the encoder: a rounded input may switch its ReLU."""
    return "encoder" not in layout.name


def leaves(model):
    """The trained tensors by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def weights_of(y):
    """Fixed weights, so that every output counts differently."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def close_each(found, wanted, tolerance):
    """Each gradient is close; one of a single number, or one that is nothing but rounding (a sum over a layer norm's
    output), relative to the largest of all: much cancels in them."""
    largest = max(w.double().abs().max().item() for w in wanted)
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype is two.dtype
        if two.numel() == 1 or two.double().abs().max() <= 1e-12 * largest:
            assert (one.double() - two.double()).abs().max() <= tolerance * largest
        else:
            close(one, two, tolerance)


def gradients(y, inputs):
    return torch.autograd.grad((y.double() * weights_of(y)).sum(), inputs)


@pytest.mark.parametrize("method, name", cells())
def test_gradients_are_those_of_the_definition(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout), layout.x()
    held = leaves(model)
    assert held, "nothing is trained"
    inputs = list(held.values())
    if not layout.tokens:
        inputs.append(x.requires_grad_())
    found = gradients(model(x), inputs)
    wanted = gradients(expected(model, method, layout, x), inputs)
    close_each(found, wanted, 1e-5)


@pytest.mark.parametrize("method, name", cells(FEW_BUT_BIAS, smooth))
def test_gradients_of_half_precision_models_keep_their_dtype(method, name):
    layout = LAYOUTS[name]
    for dtype, tolerance in ((torch.bfloat16, 4e-2), (torch.float16, 6e-3)):
        model, x = adapted(method, layout, dtype), layout.x(dtype)
        held = leaves(model)
        kept = dtype if METHODS[method].own_dtype else torch.float32  # else adapters beside half precision are float32
        assert all(p.dtype is kept for p in held.values())
        inputs = [*held.values()] if layout.tokens else [*held.values(), x.requires_grad_()]
        found = gradients(model(x), inputs)
        wanted = gradients(expected(model, method, layout, x, dtype=dtype), inputs)
        close_each(found, wanted, tolerance)


@pytest.mark.parametrize("method, name", cells([m for m in FEW_BUT_BIAS if m in SEVERAL]))
def test_two_active_adapters_get_the_gradients_of_the_definition(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout, names=("default", "other")), layout.x()
    model.base_model.set_adapter(["default", "other"])
    held = leaves(model)
    assert {w for n in held for w in n.split(".")} >= {"default", "other"}
    inputs = list(held.values())
    found = gradients(model(x), inputs)
    wanted = gradients(expected(model, method, layout, x, ("default", "other")), inputs)
    close_each(found, wanted, 1e-5)


def seen_through(method: str, name: str, dtype: torch.dtype):
    """A model whose adapter passes its input on unchanged, so that the output shows what dropout left of it."""
    layout = LAYOUTS[name]
    model = adapted(method, layout, dtype, r=layout.x().shape[1 if layout.kind == "conv" else -1], lora_dropout=RATE)
    ((_, layer),) = tuner_layers(model)
    with torch.no_grad():
        nn.init.eye_(layer.lora_A["default"].weight.flatten(1))
        nn.init.eye_(layer.lora_B["default"].weight.flatten(1))
        if method == "dora":  # so that the output is the base's plus the update's
            layer.lora_magnitude_vector["default"].weight.copy_(
                layer.adapters["default"]
                .method.norm(layer.adapters["default"])
                .view_as(layer.lora_magnitude_vector["default"].weight)
            )
    return layout, model.train(), layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "lora-bias", "dora"])
@pytest.mark.parametrize("name", ["linear", "linear-nobias", "linear-3-D", "linear-Conv1D", "conv-2d-1x1"])
def test_dropout_drops_the_same_in_forward_and_backward(method, name, dtype):
    torch.manual_seed(5)
    layout, model, layer = seen_through(method, name, dtype)
    x = layout.x(dtype).abs().add(1).requires_grad_()
    axis = 1 if layout.kind == "conv" else -1
    width = x.shape[axis]
    y = model(x)
    with torch.no_grad():
        scale = layer.scaling["default"]
        rest = y.float() - model.eval()(torch.zeros_like(x)).float()  # without biases
        without = layout.plain(dtype)(x).float() - layout.plain(dtype)(torch.zeros_like(x)).float()
        shown = (rest - without).narrow(axis, 0, width) / scale  # x, with dropped elements at zero
        kept = shown > 0.5
        close(shown, torch.where(kept, x.float() / (1 - RATE), 0.0), 1e-5 if dtype is torch.float32 else 6e-2)
        share = kept.float().mean().item()
        assert 0.2 < share < 1.0, f"kept {share:.0%} at a rate of {RATE}"

    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    held = {k: layer._modules[k]["default"].weight for k in ("lora_A", "lora_B")}
    dx, dA, dB = torch.autograd.grad(y, [x, *held.values()], g)
    with torch.no_grad():
        left = torch.where(kept, x.double() / (1 - RATE), 0.0).movedim(axis, -1).flatten(0, -2)
        g2 = g.double().movedim(axis, -1).flatten(0, -2)
        A, B = (t.double().flatten(1) for t in held.values())
        back = (g2 @ B) * scale
        tolerance = 1e-5 if dtype is torch.float32 else 4e-2
        close(dA.double().flatten(1), back.T @ left, tolerance)
        close(dB.double().flatten(1), (g2 * scale).T @ (left @ A.T), tolerance)
        W = layer.view.read(layer.get_base_layer()).double()
        through = g2 @ W + torch.where(kept, 1 / (1 - RATE), 0.0).movedim(axis, -1).flatten(0, -2) * (back @ A)
        close(dx.double().movedim(axis, -1).flatten(0, -2), through, tolerance)


@pytest.mark.parametrize("name", ["embedding", "embedding-scaled"])
def test_dropout_of_an_embedding_drops_whole_tokens(name):
    layout = LAYOUTS[name]
    torch.manual_seed(5)
    model, x = adapted("lora", layout, lora_dropout=RATE), layout.x()
    with torch.no_grad():
        full = model(x) - layout.plain()(x)
        left = (model.train()(x) - layout.plain()(x)) / (full / (1 - RATE))
    close(left, (left > 0.5).float(), 1e-3)
    per_token = (left > 0.5).float().mean(-1)
    assert ((per_token == 0) | (per_token == 1)).all() and 0 < per_token.mean() < 1


def test_dropout_in_evaluation_is_nothing():
    layout = LAYOUTS["linear"]
    with torch.no_grad():
        one = adapted("lora", layout, lora_dropout=RATE)(layout.x())
        two = adapted("lora", layout)(layout.x())
    assert torch.equal(one, two)
