"""Lean layers: tables for hooks come with a hook, casts are what making in full gives, switches are followed late."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from benchmarks.measure import calls
from benchmarks.models import stack
from peft import LoraConfig, get_peft_model
from peft.core import mold
from peft.core.deferred import Deferred
from peft.core.layer import BaseTunerLayer
from peft.core.lean import TABLES, Lean
from peft.core.mold import Casting, Mold
from peft.core.walking import walk


@pytest.fixture(autouse=True)
def nothing_traced_yet(monkeypatch):
    """As in a process of its own: other tests may have compiled something."""
    monkeypatch.setattr(Deferred, "at_once", False)


def config(**kwargs):
    return LoraConfig(**{"r": 4, "target_modules": ["proj"], **kwargs})


def layers(model):
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


@pytest.mark.parametrize("which", ["layer", "lora_A"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "state_dict_post"])
def test_a_hook_is_one_modules_own_and_runs(which, kind):
    model = get_peft_model(stack(2, 8), config(init_lora_weights=False))
    chosen = [layer if which == "layer" else layer.lora_A["default"] for layer in layers(model)]
    assert all(isinstance(m, Lean) and not set(TABLES) & set(m.__dict__) for m in chosen)
    seen = []
    handle = getattr(chosen[0], f"register_{kind}_hook")(lambda m, *args: seen.append(m))
    x = torch.randn(2, 8, requires_grad=True)
    model(x).sum().backward()
    model.state_dict()
    assert set(seen) == {chosen[0]}
    assert not set(TABLES) & set(chosen[1].__dict__)
    handle.remove()
    seen.clear()
    model(x).sum().backward()
    model.state_dict()
    assert not seen


def test_a_buffer_is_one_modules_own():
    one, two = layers(get_peft_model(stack(2, 8), config()))
    one.register_buffer("noted", torch.ones(1), persistent=False)
    one.lora_A["default"].register_buffer("kept", torch.ones(1))
    assert "noted" not in two._buffers and "kept" not in two.lora_A["default"]._buffers
    assert "lora_A.default.kept" in one.state_dict() and "noted" not in one.state_dict()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_lean_and_apart(again):
    model = get_peft_model(stack(2, 8), config(init_lora_weights=False))
    model.add_adapter("b", config(init_lora_weights=False))
    x = torch.randn(2, 8)
    model.set_adapter("b")
    twin = again(model)
    assert torch.equal(twin(x), model(x)) and not set(TABLES) & set(layers(twin)[0].__dict__)
    twin.set_adapter("default")
    assert model.active_adapters == ["b"] and not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("more", [{}, {"lora_dropout": 0.1}, {"rank_pattern": {"1.proj": 2}}, {"use_rslora": True}])
@pytest.mark.parametrize("name", ["default", "b"])
def test_casts_are_what_making_in_full_gives(monkeypatch, start, more, name):
    def made():
        torch.manual_seed(0)
        model = get_peft_model(stack(4, 8), config(init_lora_weights=start, **more))
        if name != "default":
            model.add_adapter(name, config(init_lora_weights=start, r=2, **more))
            model.set_adapter(name)
        return model.eval()

    cast = made()
    with monkeypatch.context() as patch:
        patch.setattr(Casting, "_like_others", lambda self, targets: iter(targets))
        full = made()
    state, wanted = cast.state_dict(), full.state_dict()
    assert list(state) == list(wanted) and all(torch.equal(state[k], wanted[k]) for k in state)
    grads = [(n, p.requires_grad) for n, p in cast.named_parameters()]
    assert grads == [(n, p.requires_grad) for n, p in full.named_parameters()] and repr(cast) == repr(full)
    x = torch.randn(2, 8)
    assert torch.equal(cast(x), full(x))
    for one, two in zip(layers(cast), layers(full), strict=True):
        p, q = one.adapters[name], two.adapters[name]
        apart = ("layer", "direct", "hot", "plan", "cache", "settings")
        assert {k: v for k, v in vars(p).items() if k not in apart} == {
            k: v for k, v in vars(q).items() if k not in apart
        }


@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("further", [False, True])
def test_a_cast_that_fails_leaves_the_model_as_it_was(monkeypatch, further, when):
    torch.manual_seed(0)
    base = stack(6, 8)
    model = get_peft_model(base, config(init_lora_weights=False)) if further else base
    x, before = torch.randn(2, 8), list(model.named_modules())
    y, count, cast = model(x), iter(range(99)), Mold.add

    def add(self, layer, *args):
        if next(count) == when:
            raise MemoryError("none left")
        cast(self, layer, *args)

    monkeypatch.setattr(Mold, "add", add)
    with pytest.raises(MemoryError, match="none left"):
        model.add_adapter("b", config()) if further else get_peft_model(base, config())
    assert list(model.named_modules()) == before and torch.equal(model(x), y)
    monkeypatch.undo()
    again = model if further else get_peft_model(base, config())
    again.add_adapter("b" if further else "c", config())
    assert len(layers(again)) == 6


def test_the_walk_over_a_model_leaves_nothing_behind():
    model = stack(50, 8)
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        assert len(list(walk(model))) == 101
        assert len(gc.get_objects()) - before < 5
    finally:
        gc.enable()


def test_dropout_that_does_nothing_is_made_when_asked_for():
    model = get_peft_model(stack(1, 8), config(init_lora_weights=False))
    (layer,) = layers(model)
    x = torch.randn(64, 8)
    before = model(x)
    assert "lora_dropout" not in layer._modules
    assert type(layer.lora_dropout["default"]) is nn.Identity and torch.equal(model(x), before)
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    assert not torch.allclose(model.train()(x), before)
    torch.testing.assert_close(model.eval()(x), before)


def test_a_switch_and_disabling_visit_no_layer_where_nothing_is_trained():
    def counted(n):
        model = get_peft_model(stack(n, 8), config(init_lora_weights=False))
        model.add_adapter("b", config(init_lora_weights=False))
        tuner = model.base_model
        tuner.set_adapter("b", inference_mode=True)

        def toggle():
            with model.disable_adapter():
                pass

        switch = calls(lambda: tuner.set_adapter("default", inference_mode=True))
        return switch, calls(toggle)

    assert counted(4) == counted(40)


@pytest.mark.parametrize("look", ["forward", "active", "disabled", "copy"])
def test_whoever_looks_sees_the_switch(look):
    model = get_peft_model(stack(2, 8), config(init_lora_weights=False)).eval()
    model.add_adapter("b", config(init_lora_weights=False))
    x = torch.randn(2, 8)
    default = model(x)
    with model.disable_adapter():
        assert all(layer.disable_adapters for layer in layers(model))
        base = model(x)
    model.set_adapter("b")
    if look == "active":
        assert all(layer.active_adapters == ["b"] for layer in layers(model))
    elif look == "disabled":
        assert not any(layer.disable_adapters for layer in layers(model))
    seen = copy.deepcopy(layers(model)[0])(x) if look == "copy" else model(x)
    assert not torch.equal(seen, default) and not torch.equal(seen, base)
    flags = {n: p.requires_grad for n, p in model.named_parameters() if "lora_" in n}
    assert all(flag == (".b." in n) for n, flag in flags.items())
    model.set_adapter("default")
    assert torch.equal(model(x), default)


def test_a_parameter_that_was_replaced_is_the_one_that_a_switch_frees():
    model = get_peft_model(stack(2, 8), config())
    model.add_adapter("b", config())
    model.set_adapter("b")
    layer = layers(model)[0]
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(4, 8), requires_grad=False)
    model.set_adapter("default")
    assert layer.lora_A["default"].weight.requires_grad and not layer.lora_A["b"].weight.requires_grad


def test_tracked_objects_and_calls_per_layer():
    def tracked(n):
        model = stack(n, 8)
        gc.collect()
        before = len(gc.get_objects())
        kept = get_peft_model(model, config())
        gc.collect()
        return len(gc.get_objects()) - before, kept

    for _ in range(2):  # what is made once for a process is there now
        tracked(300)
    few, many = max(tracked(100)[0] for _ in range(2)), min(tracked(300)[0] for _ in range(2))
    assert many - few <= 200 * 20 + 10  # a few objects more or less are of what other tests have left
    one, two = stack(100, 8), stack(300, 8)
    entered = [calls(lambda m=m: get_peft_model(m, config())) for m in (one, two)]
    assert (entered[1] - entered[0]) / 200 <= 120


def test_what_a_load_asks_of_each_cast_is_made_for_loads_alone(monkeypatch):
    made = []
    monkeypatch.setattr(mold, "Cast", lambda *facts: made.append(facts))
    get_peft_model(stack(3, 8), config())
    assert not made
    with mold.casts_told() as told:
        get_peft_model(stack(3, 8), config())
    assert len(made) == len(told) == 3


def test_a_second_adapter_asks_no_layer_to_follow_a_switch_first():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0", "1"]))
    assert model.base_model.call._wanted is not None
    model.add_adapter("second", LoraConfig(target_modules=["0", "1"]))
    assert model.base_model.call._wanted is not None
    with model.disable_adapter():
        model.add_adapter("third", LoraConfig(target_modules=["0", "1"]))
        assert all(model.base_model.model[i].disable_adapters for i in (0, 1))
    assert not any(model.base_model.model[i].disable_adapters for i in (0, 1))
