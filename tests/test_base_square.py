"""What DoRA keeps of a base weight between forwards follows the weight, however it is stored and wherever it lies."""

import copy
import pickle

import pytest
import torch
from torch import nn

from conformance.storages import STORAGES
from peft import LoraConfig, get_peft_model
from peft.core.memory import identity
from peft.methods import magnitude

LAYERS = {"dense": lambda: nn.Linear(1024, 512, bias=False)}
LAYERS |= {name: lambda s=s: s.model().layer for name, s in STORAGES.items()}


def adapted(kind):
    """A model with a DoRA adapter that does something, its layer and the adapter there."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(LAYERS[kind]()), LoraConfig(target_modules=["0"], r=2, use_dora=True))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(torch.randn_like(layer.lora_B["default"].weight))
    return model, layer, layer.adapters["default"]


def over(buffer, like):
    """A tensor of its own at the address of a buffer."""
    return torch.frombuffer(buffer, dtype=like.dtype).view(like.shape)


def put(tensor, buffer, numbers):
    """Give a parameter other numbers, in memory that is new but has the same address."""
    fresh = over(buffer, numbers)
    fresh.copy_(numbers)
    tensor.data = fresh


CHANGES = {
    "in place": lambda t, _: t.copy_(t.flip(0)),
    "elsewhere": lambda t, _: setattr(t, "data", t.data.flip(0).contiguous()),
    "at the same address": lambda t, buffer: put(t, buffer, t.data.flip(0).clone()),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_squares_of_a_weight_are_taken_once(kind, monkeypatch):
    model, layer, _ = adapted(kind)
    if layer.original_key(layer.original_weight()) is None:
        pytest.skip("this storage does not tell whether its numbers are the same")
    x, taken, real = torch.randn(3, layer.in_features), [], magnitude.square
    model(x)
    monkeypatch.setattr(magnitude, "square", lambda W: taken.append(W) or real(W))
    for train in (True, False, True):
        y = model.train(train)(x)
        if train:
            y.sum().backward()
    assert not taken


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4", "int8"])
def test_a_weight_that_has_changed_is_seen(kind, change):
    _, layer, p = adapted(kind)
    weight = layer.get_base_layer().weight
    buffer = bytearray(weight.numel() * weight.element_size())
    with torch.no_grad():
        put(weight, buffer, weight.data.clone())
        before = p.method.norm(p)
        CHANGES[change](weight, buffer)
    after = p.method.norm(p)
    p.cache.clear()
    torch.testing.assert_close(after, p.method.norm(p), rtol=0, atol=0)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("mode", ["requantize", "dequantize"])
def test_the_norm_is_that_of_the_base_while_merged_and_after(kind, mode):
    _, layer, p = adapted(kind)
    before = p.method.norm(p)
    layer.merge(quantized=mode)
    torch.testing.assert_close(p.method.norm(p), before, rtol=0, atol=0)
    layer.unmerge()
    torch.testing.assert_close(p.method.norm(p), before, rtol=0, atol=0)


def test_memory_is_told_by_its_owner_and_copies_are_of_none():
    first = torch.zeros(1000)
    key = identity(first)
    assert key == identity(first) == identity(first.view(1000)) and hash(key) == hash(identity(first))
    assert key != identity(first[1:]) and key != identity(first.clone())
    for twin in (copy.deepcopy(key), pickle.loads(pickle.dumps(key))):
        assert twin != key and twin[1:] == key[1:]
    first.add_(1)
    assert key != identity(first)
    with torch.inference_mode():
        assert identity(torch.zeros(2)) is None


def test_a_copy_of_a_model_looks_at_its_own_weight():
    model, _, p = adapted("dense")
    before = p.method.norm(p)
    twin = copy.deepcopy(model).base_model.model[0]
    with torch.no_grad():
        twin.get_base_layer().weight.mul_(2)
    q = twin.adapters["default"]
    assert not torch.allclose(q.method.norm(q), before)
    torch.testing.assert_close(p.method.norm(p), before, rtol=0, atol=0)
