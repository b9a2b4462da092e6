"""Methods that learn numbers at fixed places of a matrix act on activations, and make no dense matrix for that."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peft
from conformance.rows import close
from conformance.test_gradients import close_each
from peft.core.sparse import Sparse
from peft.kernels import sparse, wavelet
from peft.methods.wavelets import filters

CONFIGS = {
    "shira": lambda: peft.ShiraConfig(target_modules=["0"], r=1, random_seed=0),
    "supertuning": lambda: peft.SupertuningConfig(target_modules=["0"], sparsity=0.98),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=["0"], n_frequency=80, scaling=20.0),
    "waveft": lambda: peft.WaveFTConfig(target_modules=["0"], n_frequency=80),
    "waveft, db3": lambda: peft.WaveFTConfig(target_modules=["0"], n_frequency=80, wavelet_family="db3"),
    "waveft, none": lambda: peft.WaveFTConfig(target_modules=["0"], n_frequency=80, use_idwt=False),
}
SHAPES = [(48, 72), (33, 50), (50, 33)]
each = pytest.mark.parametrize("name", CONFIGS)


def layer_of(name, shape=(48, 72), bias=True, dtype=torch.float64):
    """A linear layer under a trained-looking adapter."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(*shape, bias=bias, dtype=dtype)), CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model.to(dtype).base_model.model[0]


def by_definition(layer, x):
    """W' x + b' with the dense W'."""
    p = layer.adapters["default"]
    W = layer.get_base_layer().weight
    return nn.functional.linear(x, p.method.weight(p, W), layer.get_base_layer().bias)


def numbers(layer):
    """The one trained tensor."""
    (found,) = (t for t in layer.parameters() if t.requires_grad)
    return found


@pytest.fixture
def no_dense(monkeypatch):
    """The dense update is not to be made."""

    def refuse(*args, **kwargs):
        raise AssertionError("a dense update was made")

    for kind in Sparse.__subclasses__():
        monkeypatch.setattr(kind, "live_delta", refuse)
        monkeypatch.setattr(kind, "whole_from", Sparse.whole_from)


@each
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_values_and_gradients_are_the_definitions(name, shape, rows, no_dense):
    layer = layer_of(name, shape, bias=rows != 3)
    x = torch.randn(rows, shape[0], dtype=torch.float64, requires_grad=True)
    y, wanted = layer(x), by_definition(layer, x)
    close(y, wanted)
    g, inputs = torch.randn_like(y), (numbers(layer), x)
    close_each(torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, inputs, g), 1e-10)
    with torch.no_grad():
        close(layer.eval()(x), wanted)
        close(layer(x.view(1, *x.shape)), wanted[None])


@each
def test_second_derivatives_are_the_definitions(name):
    layer = layer_of(name)
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    inputs = (numbers(layer), x)

    def twice(y):
        first = torch.autograd.grad(y.tanh().square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    close_each(twice(layer(x)), twice(by_definition(layer, x)), 1e-9)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["fourierft", "waveft"])
def test_many_rows_take_one_product_with_the_whole_weight(name, grad, monkeypatch):
    """Transforms of features are for each row, that of the update is not."""
    layer, made = layer_of(name, SHAPES[1]), []
    kind = type(layer.adapters["default"].method)
    plain = kind.live_delta
    monkeypatch.setattr(kind, "live_delta", lambda *a: made.append(0) or plain(*a))
    x = torch.randn(800, SHAPES[1][0], dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        close(layer(x), by_definition(layer, x))
        assert made == [0]
        monkeypatch.setattr(kind, "whole_from", Sparse.whole_from)
        close(layer(x), by_definition(layer, x))
        assert made == [0]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(name, dtype, no_dense):
    layer = layer_of(name, dtype=torch.float32)
    layer.get_base_layer().to(dtype)
    x = torch.randn(6, 48, dtype=dtype)
    close(layer(x), by_definition(layer.to(torch.float64), x.double()).to(dtype))


@each
def test_places_follow_the_tensor_that_holds_them(name):
    layer = layer_of(name)
    x = torch.randn(5, 48, dtype=torch.float64)
    layer(x)
    p = layer.adapters["default"]
    with torch.no_grad():
        held = p.held_buffer(p.method.places_key)
        held.copy_(held.flip(-1))  # in place: the same places, in another order
    close(layer(x), by_definition(layer, x))
    close(copy.deepcopy(layer)(x), by_definition(layer, x))


@each
def test_many_numbers_are_a_dense_update(name, monkeypatch):
    layer, x = layer_of(name), torch.randn(40, 48, dtype=torch.float64)
    monkeypatch.setattr("peft.core.sparse.SHARE", (10_000, 10_000))
    monkeypatch.setattr(sparse, "product", None)
    inputs = (numbers(layer), x.requires_grad_())
    y, wanted = layer(x), by_definition(layer, x)
    close(y, wanted)
    g = torch.randn_like(y)
    close_each(torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, inputs, g), 1e-10)


def test_the_backward_pass_keeps_the_input_and_the_numbers_only():
    places = sparse.Places(torch.tensor(0), torch.tensor([4, 0, 4]), torch.tensor([1, 2, 0]), (6, 3))
    values, z = (torch.randn(s, requires_grad=True) for s in (3, (3, 7)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = sparse.product(values, z, places)
    assert kept == [values.shape, z.shape]
    close(y, sparse.plain(values, z, places))


@pytest.mark.parametrize("family", ["db1", "db2", "coif2", "sym5"])
@pytest.mark.parametrize("size", [7, 30])
def test_features_are_transformed_as_matrices_are(family, size):
    pair = torch.tensor(filters(family), dtype=torch.float64)
    width = size + pair.shape[-1] - 2 + (size + pair.shape[-1]) % 2
    eye = torch.eye(width, dtype=torch.float64)
    M = wavelet.columnwise(*eye.chunk(2), pair)
    close(wavelet.synthesis(eye, pair), M.mT)
    x = torch.randn(3, size, dtype=torch.float64)
    close(wavelet.analysis(x, pair), M[:size].mT @ x.mT)


@pytest.mark.parametrize("frozen", ["", "x", "b", "values", "xb", "W"])
def test_a_layer_is_one_node_beside_a_frozen_matrix(frozen):
    torch.manual_seed(0)
    places = sparse.Places(torch.tensor(0), torch.tensor([4, 0, 4]), torch.tensor([1, 2, 0]), (6, 3))
    x, W, b, values = (torch.randn(s, dtype=torch.float64) for s in ((7, 3), (6, 3), (6,), (3,)))
    for t, name in ((x, "x"), (b, "b"), (values, "values")):
        t.requires_grad_(name not in frozen)
    W.requires_grad_(frozen == "W")
    inputs = [t for t in (x, W, b, values) if t.requires_grad]
    form = lambda *_: sparse.linear(x, W, b, values, places)  # noqa: E731
    y, wanted = form(), nn.functional.linear(x, W, b) + sparse.plain(values, x.mT, places).mT
    assert ("_Linear" in type(y.grad_fn).__name__) is (frozen != "W")
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, g, retain_graph=True)
    close_each(found, torch.autograd.grad(wanted, inputs, g), 1e-10)
    assert torch.autograd.gradcheck(form, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(form, inputs, fast_mode=True)
