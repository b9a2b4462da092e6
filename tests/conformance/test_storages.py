"""Every method on every quantised storage: the definition on the numbers that the storage holds."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from peft import LossyMergeWarning, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from .rows import (
    METHODS,
    SEVERAL,
    adapted,
    close,
    config,
    expected,
    forbidden,
    given,
    same,
    told,
    tuner_layers,
)
from .storages import IN, OUT, STORAGES, numbers, payload
from .test_gradients import close_each, gradients, leaves

MODES = ("requantize", "compensated", "dequantize")


def cells(methods=METHODS, merged=False):
    """(method, storage) of every pair that can be built."""
    return [
        (method, name)
        for name, layout in STORAGES.items()
        for method in methods
        if forbidden(method, layout) is None
        and METHODS[method].values is None  # a row that replaces the module instead of adapting a weight
        and (name == "nf4" or not method.endswith("-dora"))  # DoRA over each method: once is enough
        and (not merged or METHODS[method].merges)
    ]


each_cell = pytest.mark.parametrize("method, name", cells())
each_mergeable = pytest.mark.parametrize("method, name", cells(merged=True))


def base_of(model):
    """The quantised layer."""
    ((_, layer),) = tuner_layers(model)
    return layer.get_base_layer()


def exact(model, x):
    """The output where gradients are wanted: bitsandbytes' answers in evaluation have rounded scales on some CPUs."""
    return model(x.detach().requires_grad_()).detach()


@each_cell
def test_forward_is_the_definition_on_the_numbers_held(method, name):
    layout = STORAGES[name]
    model, x = adapted(method, layout), layout.x()
    with torch.no_grad():
        wanted = expected(model, method, layout, x)
    close(exact(model, x), wanted, layout.error)
    with model.disable_adapter():
        same(exact(model, x), layout.base(x))
    with torch.no_grad(), model.disable_adapter():
        same(model(x), layout.model()(x))


# the formulas of FRoD take minutes to differentiate at this size; its gradients are held to them on dense layers
QUICK = [m for m in METHODS if not m.startswith("frod")]


@pytest.mark.parametrize("method, name", cells(QUICK))
def test_gradients_are_those_of_the_dense_layer(method, name):
    layout = STORAGES[name]
    model, x = adapted(method, layout), layout.x().requires_grad_()
    inputs = [*leaves(model).values(), x]
    found = gradients(model(x), inputs)
    wanted = gradients(expected(model, method, layout, x), inputs)
    close_each(found, wanted, max(1e-5, layout.error))


@each_cell
def test_no_dense_copy_is_kept_for_the_backward(method, name):
    layout = STORAGES[name]
    model, x = adapted(method, layout), layout.x().requires_grad_()
    dense = numbers(base_of(model))
    kept = []

    def note(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    assert y.requires_grad
    own = [t.squeeze() for t in kept if t.is_floating_point() and t.numel() == IN * OUT]
    copies = [t for t in own for W in (dense, dense.mT) if t.shape == W.shape and torch.equal(t.to(W.dtype), W)]
    assert not copies


@each_mergeable
def test_merge_in_each_way_and_unmerge(method, name):
    layout = STORAGES[name]
    model, x = adapted(method, layout), layout.x()
    before, untouched = payload(base_of(model)), numbers(base_of(model))
    wanted = exact(model, x)
    with torch.no_grad():
        W = expected_weight(model)
        for mode in MODES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LossyMergeWarning)
                ((_, error),) = model.merge_adapter(quantized=mode).items()
            held = numbers(base_of(model)).double()
            assert error.mode == mode and abs(error.relative - float((held - W).norm() / W.norm())) < 1e-3
            if mode == "dequantize":
                close(model(x), wanted, max(2e-5, layout.error))
            else:
                assert type(base_of(model)) is type(layout.model().layer)
                assert error.relative < 0.2 or mode == "compensated"
            model.unmerge_adapter()
            for now, then in zip(payload(base_of(model)), before, strict=True):
                same(now, then)
            same(numbers(base_of(model)), untouched)
            with torch.enable_grad():
                same(exact(model, x), wanted)
        plain = model.merge_and_unload(quantized=mode)
        same(numbers(plain.layer).double(), held)
    assert not tuner_layers(plain)


def expected_weight(model):
    """W' in double precision."""
    ((_, layer),) = tuner_layers(model)
    return layer.stack(("default",)).weight().double()


@each_cell
def test_saved_and_loaded(method, name):
    layout = STORAGES[name]
    model, x = adapted(method, layout), layout.x()
    state = get_peft_model_state_dict(model)
    other = told(get_peft_model(layout.model(), config(method, layout)), method, layout).eval()
    set_peft_model_state_dict(other, state)
    with torch.no_grad():
        close(other(x), model(x), max(1e-6, layout.error))
        close(copy.deepcopy(model)(x), model(x), max(1e-6, layout.error))


@pytest.mark.parametrize("method, name", cells([m for m in SEVERAL if METHODS[m].of_input is None]))
def test_mixed_batch(method, name):
    layout = STORAGES[name]
    model, x = adapted(method, layout, names=("one", "two")), layout.x()
    names = ["two", "__base__", "one", "two"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for i, one in enumerate(names):
            row = slice(i, i + 1)
            if one == "__base__":
                with model.disable_adapter():
                    wanted = model(x[row], **given(method, row))
            else:
                model.set_adapter(one)
                wanted = model(x[row], **given(method, row))
            close(mixed[row], wanted, max(1e-5, 2 * layout.error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STORAGES)
def test_a_merged_layer_of_a_half_precision_model_runs(name, dtype):
    layout = STORAGES[name]
    model, x = adapted("lora", layout, dtype), layout.x(dtype)
    for mode in MODES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LossyMergeWarning)
            model.merge_adapter(quantized=mode)
        with torch.no_grad():
            assert model(x).isfinite().all()
        model.unmerge_adapter()
