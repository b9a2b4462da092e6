"""Contexts that are left in another order than the one opposite to that in which they were entered."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import nn

from peft import LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.algebra.scale import rescale_adapter_scale
from peft.core.kept import KEEPING
from peft.core.layer import tuner_layers
from peft.core.state import disabled
from peft.helpers import DoraCaching, disable_input_dtype_casting

X = torch.ones(2, 6)


def body() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, **changes})


def adapted(kind: str = "plain") -> Any:
    changes = {"modules_to_save": ["2"], "target_modules": ["0"]} if kind == "saved" else {}
    model = get_peft_model(body(), config(**changes)).eval()
    model.add_adapter("other", config(**changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    if kind == "merged":
        model.merge_adapter()
    if kind == "several":
        model.base_model.set_adapter(["default", "other"])
    return model


def state(model: Any) -> Any:
    layers = [layer for _, layer in tuner_layers(model)]
    held = [(layer.disable_adapters, tuple(layer.active_adapters), layer.merged) for layer in layers]
    return held, [p.requires_grad for p in model.parameters()], model(X)


def same(one: Any, two: Any) -> bool:
    return one[:2] == two[:2] and torch.allclose(one[2], two[2], atol=1e-6)


KINDS = ["plain", "saved", "merged", "several"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", permutations(range(3)), ids=str)
def test_a_model_is_disabled_until_the_last_context_is_left(kind, order):
    model = adapted(kind)
    before, plain = state(model), body()(X)
    contexts = [model.disable_adapter() for _ in range(3)]
    for context in contexts:
        context.__enter__()
    for i in order:
        torch.testing.assert_close(model(X), plain)
        contexts[i].__exit__(None, None, None)
    assert same(state(model), before)
    assert not torch.allclose(model(X), plain)


@pytest.mark.parametrize("kind", ["plain", "saved"])
def test_a_switch_inside_stays_and_a_context_restores_the_rest(kind):
    model, plain = adapted(kind), body()(X)
    model.set_adapter("other")
    wanted = state(model)
    model.set_adapter("default")
    one, two = model.disable_adapter(), model.disable_adapter()
    one.__enter__()
    model.set_adapter("other")
    two.__enter__()
    one.__exit__(None, None, None)
    torch.testing.assert_close(model(X), plain)
    two.__exit__(None, None, None)
    assert same(state(model), wanted)


def test_what_is_switched_by_hand_between_contexts_is_found_again_in_order():
    model, plain = adapted(), body()(X)
    own = model(X)
    with model.disable_adapter():
        model.base_model.enable_adapter_layers()
        with model.disable_adapter():
            torch.testing.assert_close(model(X), plain)
        torch.testing.assert_close(model(X), own)
    torch.testing.assert_close(model(X), own)
    model.base_model.disable_adapter_layers()
    with ExitStack() as stack:
        stack.enter_context(model.disable_adapter())
        stack.enter_context(model.disable_adapter())
    torch.testing.assert_close(model(X), plain)
    model.base_model.enable_adapter_layers()
    torch.testing.assert_close(model(X), own)


def test_generators_and_errors():
    model, plain = adapted(), body()(X)
    before = state(model)

    def rows():
        with model.disable_adapter():
            yield model(X)
            yield model(X)

    first, second = rows(), rows()
    for values in (next(first), next(second), next(first)):
        torch.testing.assert_close(values, plain)
    first.close()
    torch.testing.assert_close(next(second), plain)
    with pytest.raises(KeyError), model.disable_adapter():
        del second
        gc.collect()
        torch.testing.assert_close(model(X), plain)
        raise KeyError
    assert same(state(model), before)


def test_layers_that_come_and_go_meanwhile():
    model, plain = adapted(), body()(X)
    one, two = model.disable_adapter(), model.disable_adapter()
    one.__enter__()
    model.add_adapter("third", config(target_modules=["0"], r=3))
    two.__enter__()
    one.__exit__(None, None, None)
    torch.testing.assert_close(model(X), plain)
    model.delete_adapter("other")
    two.__exit__(None, None, None)
    assert not any(layer.disable_adapters for _, layer in tuner_layers(model))
    for name in ("third", "default"):
        model.set_adapter(name)
        assert not torch.allclose(model(X), plain)


def test_a_merge_inside():
    model, plain = adapted(), body()(X)
    own = model(X)
    one, two = model.disable_adapter(), model.disable_adapter()
    one.__enter__()
    model.merge_adapter()
    two.__enter__()
    one.__exit__(None, None, None)
    torch.testing.assert_close(model(X), plain)
    two.__exit__(None, None, None)
    torch.testing.assert_close(model(X), own)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), own)
    with model.disable_adapter():
        assert torch.equal(model(X), plain)


def test_contexts_of_a_model_without_a_tuner_around_it():
    model = inject_adapter_in_model(config(), body()).eval()
    own, plain = model(X), body()(X)
    one, two = disabled(model), disabled(model)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    torch.testing.assert_close(model(X), plain)
    two.__exit__(None, None, None)
    torch.testing.assert_close(model(X), own)


@pytest.mark.parametrize("order", permutations(range(3)), ids=str)
def test_each_multiplier_is_taken_out_when_its_block_is_left(order):
    model, factors = adapted(), [2.0, 3.0, 5.0]
    scale = {path: layer.scaling["default"] for path, layer in tuner_layers(model)}
    contexts = [rescale_adapter_scale(model if f != 3 else model.base_model, f) for f in factors]
    left = 1.0
    for context, factor in zip(contexts, factors, strict=True):
        context.__enter__()
        left *= factor
    for i in order:
        contexts[i].__exit__(None, None, None)
        left /= factors[i]
        for path, layer in tuner_layers(model):
            assert layer.scaling["default"] == pytest.approx(scale[path] * left)
    assert all(layer.scaling["default"] == scale[path] for path, layer in tuner_layers(model))


def test_a_scale_that_was_set_meanwhile_stays():
    model = adapted()
    one, two = rescale_adapter_scale(model, 2), rescale_adapter_scale(model, 3)
    one.__enter__()
    two.__enter__()
    layer = tuner_layers(model).__next__()[1]
    layer.scaling["default"] = 7.0
    one.__exit__(None, None, None)
    two.__exit__(None, None, None)
    assert layer.scaling["default"] == 7.0


def test_inputs_are_cast_again_after_the_last_context():
    model, other = adapted(), adapted()
    layers = [layer for _, layer in tuner_layers(model)]
    one, between, two = (disable_input_dtype_casting(m) for m in (model, other, model))
    for context in (one, between, two):
        context.__enter__()
    one.__exit__(None, None, None)
    assert not any(layer.cast_input_dtype_enabled for layer in layers)
    two.__exit__(None, None, None)
    assert all(layer.cast_input_dtype_enabled for layer in layers)
    assert not any(layer.cast_input_dtype_enabled for _, layer in tuner_layers(other))
    between.__exit__(None, None, None)
    assert all(layer.cast_input_dtype_enabled for _, layer in tuner_layers(other))


def test_keeping_is_as_it_was_after_the_last_context():
    one, two = DoraCaching(False), DoraCaching(False)
    one.__enter__()
    two.__enter__()
    one.__exit__()
    assert not KEEPING.on
    two.__exit__()
    assert KEEPING.on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "second", [LoHaConfig(r=2, target_modules=["0", "2"]), LoraConfig(r=2, target_modules=["0", "2"], use_dora=True)]
)
def test_merged_one_by_one_has_the_bits_of_merged_at_once_and_keeps_them_over_a_context(second, dtype):
    def bits() -> list[torch.Tensor]:
        return [layer.get_base_layer().weight.detach().clone() for _, layer in tuner_layers(model)]

    model = get_peft_model(body().to(dtype), config()).eval()
    model.add_adapter("other", second)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".other" in n:
                p.add_(torch.linspace(-0.4, 0.5, p.numel()).view_as(p))
    base = bits()
    for first, then in [("other", "default"), ("default", "other")]:
        model.base_model.set_adapter([first, then])
        model.merge_adapter()
        at_once = bits()
        model.unmerge_adapter()
        model.merge_adapter([first])
        with pytest.warns(UserWarning, match="Now additionally merging"):
            model.merge_adapter([then])
        assert all(map(torch.equal, bits(), at_once))
        with model.disable_adapter():
            assert all(map(torch.equal, bits(), base))
        assert all(map(torch.equal, bits(), at_once))
        model.unmerge_adapter()
        assert all(map(torch.equal, bits(), base))
