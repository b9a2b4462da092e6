"""DoRA's training step, which takes the norm out of the product with the input: the numbers of the definition."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import calls
from peft import LoHaConfig, LoraConfig, get_peft_model

D, K = 24, 40


def adapted(bias=True, **options):
    """A model under a DoRA that does something, and its layer."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], r=4, use_dora=True, init_lora_weights=False, **options)
    model = get_peft_model(nn.Sequential(nn.Linear(D, K, bias=bias)), config).train()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(torch.rand(K) + 0.5)
    return model, layer


def defined(layer, x, mask=None):
    """m / |V| (W x + s B A x) + b, V = W + s B A, the norm a constant, all in double precision."""
    W, b = layer.base_layer.weight.double(), layer.base_layer.bias
    A, B, m = (t.double() for t in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, magnitude(layer)))
    kept = x if mask is None else x * mask
    V = W + layer.scaling["default"] * B @ A
    n = V.norm(dim=1).detach()
    y = x @ W.T + layer.scaling["default"] * (kept @ A.T @ B.T)
    y = y * (m / torch.where(n == 0, 1.0, n))
    return y if b is None else y + b.double()


def magnitude(layer):
    return layer.lora_magnitude_vector["default"].weight


def learnt(layer):
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight, magnitude(layer)]


class Joined(TorchDispatchMode):
    """Whether the rows of A joined those of an input."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = self.seen or (func is torch.ops.aten.cat.default and len(args[0]) == 2)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, D), (2, 3, D), (64, D)])  # of the last the update goes into the weight
def test_values_and_gradients_are_those_of_the_definition(shape, bias):
    model, layer = adapted(bias)
    x = torch.randn(shape, requires_grad=True)
    with Joined() as mode:
        y = model(x)
    assert mode.seen == (shape[0] < 64)
    wanted = defined(layer, x.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    inputs = [x, *learnt(layer)]
    g = torch.randn(y.shape)
    for one, other in zip(
        torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, inputs, g.double()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_with_dropout_the_norm_is_of_the_whole_update():
    model, layer = adapted(lora_dropout=0.5)
    x = torch.eye(D, requires_grad=True)
    y = model(x)
    with torch.no_grad():
        W, b, A, B, m = layer.base_layer.weight, layer.base_layer.bias, *learnt(layer)
        n = (W + layer.scaling["default"] * B @ A).norm(dim=1)
        rest = (y - b) / (m / n) - W.T  # what dropout left of s A' B', row by row
        full = layer.scaling["default"] * (A.T @ B.T)
    share = (rest / full).mean(1)
    assert torch.allclose(share, share.round(), atol=1e-2) and set(share.round().tolist()) == {0.0, 2.0}


def test_gradients_are_differentiated_again():
    model, layer = adapted()
    x, inputs = torch.randn(5, D, requires_grad=True), learnt(layer)

    def second(y):
        first = torch.autograd.grad(y.double().tanh().sum(), [x, *inputs], create_graph=True)
        return torch.autograd.grad(sum(t.double().square().sum() for t in first), [x, *inputs])

    for one, other in zip(second(model(x)), second(defined(layer, x.double())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(5, D), (64, D)])
def test_gradients_of_several_outputs_are_taken_at_once(shape):
    model, layer = adapted()
    x = torch.randn(shape, requires_grad=True)
    y, inputs = model(x), [x, *learnt(layer)]
    g = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, inputs, g, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for one, all_of_it in zip(torch.autograd.grad(y, inputs, g[i], retain_graph=True), together, strict=True):
            torch.testing.assert_close(all_of_it[i], one, rtol=1e-4, atol=1e-5)


def test_dropout_may_leave_nothing():
    model, layer = adapted(lora_dropout=0.5)
    layer.lora_dropout["default"].p = 1.0
    x = torch.randn(5, D, requires_grad=True)
    y, inputs = model(x), [x, *learnt(layer)]
    wanted = defined(layer, x.double(), torch.zeros_like(x))
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    g = torch.randn(y.shape)
    others = torch.autograd.grad(wanted, inputs, g.double(), allow_unused=True)
    for one, other in zip(torch.autograd.grad(y, inputs, g), others, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_has_no_direction():
    model, layer = adapted(False)
    with torch.no_grad():
        layer.base_layer.weight[3].zero_()
        layer.lora_B["default"].weight[3].zero_()
    y = model(torch.randn(5, D))
    assert y.isfinite().all() and not y[:, 3].any()


def test_what_is_not_finite_shows():
    model, layer = adapted(False)
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = torch.nan
    assert model(torch.ones(5, D)).isnan().all()


CHANGES = {
    "in place": lambda t: t.mul_(torch.rand(K, 1) + 1),
    "elsewhere": lambda t: setattr(t, "data", t.data * (torch.rand(K, 1) + 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_weight_that_has_changed_is_seen(change):
    model, layer = adapted()
    x = torch.randn(5, D)
    before = model(x)
    with torch.no_grad():
        CHANGES[change](layer.base_layer.weight)
    torch.testing.assert_close(model(x).double(), defined(layer, x.double()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.base_model.model[0].base_layer.weight.mul_(torch.rand(K, 1) + 1)
    for one in (twin, model):
        wanted = defined(one.base_model.model[0], x.double())
        torch.testing.assert_close(one(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_beside_a_merged_adapter_the_norm_is_of_the_base():
    model, layer = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["other", "default"])
    x = torch.randn(5, D)
    y = model(x)
    layer.merge(adapter_names=["other"])
    assert layer.merged_adapters == ["other"]
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("why", ["autocast", "double precision", "no gradients"])
def test_elsewhere_the_norm_is_taken_by_itself(why):
    model, _ = adapted()
    x = torch.randn(5, D)
    if why == "double precision":
        model, x = model.double(), x.double()
    gradients = torch.set_grad_enabled(why != "no gradients")
    with Joined() as mode, torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"), gradients:
        model(x)
    assert not mode.seen


def test_a_training_step_enters_few_functions():
    """Of Python's and C's, the base's own call among them: a large product leaves none of them in the caches."""
    x = torch.randn(5, D, requires_grad=True)
    for most, options in ((37, {"use_dora": False}), (60, {"use_dora": False, "lora_dropout": 0.1}), (56, {})):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["0"], r=4, **{"use_dora": True} | options)
        layer = get_peft_model(nn.Sequential(nn.Linear(D, K)), config).train().base_model.model[0]
        layer(x), layer(x)
        assert calls(lambda layer=layer: layer(x)) <= most, options


@pytest.mark.parametrize("train", [False, True])
def test_the_norm_of_few_features_is_not_what_cancelling_left_of_it(train):
    """Of one feature a row of V may be close to zero, where |W|^2 + 2 s W A' B' + ... has no digit left."""
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["0"], use_dora=True, r=8, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(1, 3000)), config).train(train)
    exact, x = copy.deepcopy(model).double(), torch.randn(5, 1)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(model(x).double(), exact(x.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig], ids=["low rank", "LoHa"])
def test_norms_of_double_precision_are_in_double_precision(config):
    model = get_peft_model(nn.Sequential(nn.Linear(37, 13)).double(), config(r=3, target_modules=["0"], use_dora=True))
    layer, x = model.base_model.model[0], torch.randn(5, 37, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.adapter_parameters("default"):
            p.add_(torch.randn_like(p), alpha=0.2)
    p, W = layer.adapters["default"], layer.base_layer.weight
    V = W + p.method.delta(p, W)
    gain = layer.lora_magnitude_vector["default"].weight / torch.linalg.vector_norm(V, dim=1)
    wanted = F.linear(x, V * gain[:, None], layer.base_layer.bias)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), wanted, rtol=1e-13, atol=1e-13)
