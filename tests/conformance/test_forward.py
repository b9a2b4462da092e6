"""Forward, merge and state of every method on every layout."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch

from peft import get_peft_model, get_peft_model_state_dict, registry, set_peft_model_state_dict

from .layouts import LAYOUTS, SAMPLES
from .oracles.lora import SUBTRACTING
from .rows import (
    FEW,
    METHODS,
    SEVERAL,
    adapted,
    cells,
    close,
    config,
    expected,
    forbidden,
    given,
    mergeable,
    same,
    told,
    tuner_layers,
)

BIASES = ("lora-bias", "dora-bias", "beft")  # they give a bias to layers without one, which cannot be merged
HALVES = tuple(m for m in FEW if m not in BIASES)
HALF = (torch.bfloat16, torch.float16)
CAST = ("linear", "linear-Conv1D", "conv-2d", "embedding", "attention-packed")
each_cell = pytest.mark.parametrize("method, name", cells())
each_mergeable = pytest.mark.parametrize("method, name", cells(merged=True))
few_cells = pytest.mark.parametrize("method, name", cells(FEW))
few_mergeable = pytest.mark.parametrize("method, name", cells(FEW, merged=True))
half_cells = pytest.mark.parametrize("method, name", cells(HALVES))


def base_state(model):
    """The base weights by name, without adapters."""
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if not any(row.prefix in n for row in METHODS.values())
    }


@each_cell
def test_forward_is_the_definition_and_disabled_the_base_to_the_bit(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout), layout.x()
    with torch.no_grad():
        found, base = model(x), layout.plain()(x)
        close(found, expected(model, method, layout, x))
        assert not torch.allclose(found, base, atol=1e-2), "the adapter does nothing"
        with model.disable_adapter():
            same(model(x), base)
        if "max-norm" not in name:  # torch shrank the looked-up rows of the base weight itself
            same(model(x), found)


@half_cells
def test_in_half_precision_forward_is_the_definition_and_disabled_the_base_to_the_bit(method, name):
    layout = LAYOUTS[name]
    for dtype in HALF:
        with torch.no_grad():
            model, x = adapted(method, layout, dtype), layout.x(dtype)
            close(model(x), expected(model, method, layout, x, dtype=dtype).to(dtype))
            with model.disable_adapter():
                same(model(x), layout.plain(dtype)(x))


@each_cell
def test_a_new_adapter_changes_nothing_and_can_be_made_on_the_meta_device(method, name):
    layout = LAYOUTS[name]
    real = get_peft_model(layout.model(), config(method, layout))
    shapes = {n: p.shape for n, p in real.named_parameters()}
    shared = method == "orthogonal" and layout.kind == "parameter" and "3-D" in name  # experts share a pair of factors
    if METHODS[method].identity and not shared:
        with torch.no_grad():
            close(told(real, method, layout).eval()(layout.x()), layout.plain()(layout.x()))
    with torch.device("meta"):
        if METHODS[method].of_numbers:
            with pytest.raises(ValueError, match="meta device lacks"):
                get_peft_model(layout.model(), config(method, layout))
            return
        model = get_peft_model(layout.model(), config(method, layout))
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert all(p.is_meta for p in model.parameters())


@each_mergeable
def test_merged_is_forward(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout), layout.x()
    if method in BIASES and not layout.bias:
        with pytest.raises(RuntimeError, match="has a bias"):
            model.merge_adapter()
        return
    with torch.no_grad():
        wanted = model(x)
        before = base_state(model)
        model.merge_adapter()
        close(model(x), wanted)
        model.unmerge_adapter()
        for key, value in base_state(model).items():
            same(value, before[key])
        same(model(x), wanted)
        plain = model.merge_and_unload()
        close(plain(x), wanted)
    assert not list(tuner_layers(plain)) and not any(METHODS[method].prefix in n for n, _ in plain.named_parameters())
    assert plain.state_dict().keys() == layout.model().state_dict().keys()


@pytest.mark.parametrize("method, name", [c for c in cells() if c[1] in CAST])
def test_adapters_that_are_cast_with_their_model_run_and_merge(method, name):
    layout = LAYOUTS[name]
    for dtype in HALF:
        model, x = adapted(method, layout).to(dtype), layout.x(dtype)
        given = x.clone().requires_grad_() if x.is_floating_point() else x
        wanted = model(given)
        assert wanted.dtype is dtype
        wanted.float().square().sum().backward()
        if METHODS[method].merges:
            with torch.no_grad():
                model.merge_adapter()
                close(model(x), wanted, 6e-2 if dtype is torch.bfloat16 else 2e-2)


@pytest.mark.parametrize("method, name", cells(HALVES, merged=True))
def test_merged_in_half_precision_is_forward_and_unmerges_to_the_bit(method, name):
    layout = LAYOUTS[name]
    for dtype in HALF:
        model, x = adapted(method, layout, dtype), layout.x(dtype)
        before = base_state(model)
        with torch.no_grad():
            wanted = model(x)
            model.merge_adapter()
            close(model(x), wanted, 6e-2 if dtype is torch.bfloat16 else 2e-2)  # W' is rounded to the base's dtype
            model.unmerge_adapter()
            if "max-norm" not in name or METHODS[method].values is None:  # torch shrinks rows of a copy at each look-up
                same(model(x), wanted)
        for key, value in base_state(model).items():
            same(value, before[key])


@pytest.mark.parametrize("method, name", cells([m for m in METHODS if m not in SEVERAL]))
def test_where_one_adapter_runs_two_are_refused(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout, names=("default", "other")), layout.x()
    with torch.no_grad():
        wanted = model(x)
        with pytest.raises(ValueError, match="Only one adapter"):
            model.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match="Only one adapter"):
            model.merge_adapter(["default", "other"])
        same(model(x), wanted)


@pytest.mark.parametrize("method, name", cells(SEVERAL))
def test_two_active_adapters_are_applied_in_order_and_merging_one_keeps_the_answer(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout, names=("default", "other")), layout.x()
    model.base_model.set_adapter(["default", "other"])
    before = base_state(model)
    with torch.no_grad():
        found = model(x)
        close(found, expected(model, method, layout, x, ("default", "other")))
        if method not in FEW or not mergeable(method, layout) or (method in BIASES and not layout.bias):
            return
        for names in (["default"], ["other", "default"]):  # however they are listed
            model.merge_adapter(names)
            close(model(x), found)
            model.unmerge_adapter()
            same(model(x), found)
    for key, value in base_state(model).items():
        same(value, before[key])


@pytest.mark.parametrize("method, name", cells(FEW, lambda layout: layout.batched))
def test_a_mixed_batch_is_separate_runs(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout, names=("default", "other")), layout.x()
    names = ["other", "__base__", "default", "other"]
    with torch.no_grad():
        found = model(x, adapter_names=names)
        parts = []
        for i, adapter in enumerate(names):
            if adapter == "__base__":
                parts.append(layout.plain()(x[i : i + 1]))
                continue
            model.set_adapter(adapter)
            if METHODS[method].of_input is None:
                parts.append(model(x[i : i + 1], **given(method, slice(i, i + 1))))
            else:  # what one adapter runs together counts together
                mine = [k for k, other in enumerate(names) if other == adapter]
                parts.append(model(x[mine])[mine.index(i)].unsqueeze(0))
    assert len(names) == SAMPLES
    close(found, torch.cat(parts))


@each_cell
def test_saved_is_loaded(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout), layout.x()
    saved = get_peft_model_state_dict(model)
    with torch.no_grad():
        wanted = model(x)
    for meta in (False, True):
        fresh = told(get_peft_model(layout.model(), config(method, layout), low_cpu_mem_usage=meta), method, layout)
        if meta:
            assert all(p.is_meta for n, p in fresh.named_parameters() if METHODS[method].prefix in n)
        result = set_peft_model_state_dict(fresh, saved, low_cpu_mem_usage=meta)
        assert not result.unexpected_keys
        with torch.no_grad():
            same(fresh.eval()(x), wanted)
        again = get_peft_model_state_dict(fresh)
        assert again.keys() == saved.keys() and all(torch.equal(again[k], saved[k]) for k in saved)


@few_cells
def test_a_deep_copy_is_independent(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout), layout.x()
    with torch.no_grad():
        wanted = model(x)
        twin = copy.deepcopy(model)
        same(twin(x), wanted)
        for p in twin.parameters():
            p.mul_(1.5)
        same(model(x), wanted)
        assert not torch.equal(twin(x), wanted)
        with twin.disable_adapter():
            twin(x)
        same(model(x), wanted)


@few_cells
def test_a_pickle_gives_the_same_model(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout, names=("default", "other")), layout.x()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    with torch.no_grad():
        for twin in (loaded, pickle.loads(pickle.dumps(model))):
            twin.set_adapter("other")
            model.set_adapter("other")
            same(twin(x), model(x))
            twin.set_adapter("default")
            model.set_adapter("default")
            same(twin(x), model(x))


@few_mergeable
def test_a_merge_that_is_not_finite_is_refused_whole(method, name):
    layout = LAYOUTS[name]
    model, x = adapted(method, layout), layout.x()
    if method in BIASES and not layout.bias:
        pytest.skip("there is no bias to merge into")
    *_, (_, last) = tuner_layers(model)
    floats = [s for s in last.slots("default") if s.tensor.is_floating_point()]
    slot = ([s for s in floats if isinstance(s.tensor, torch.nn.Parameter)] or floats)[-1]
    with torch.no_grad():
        slot.tensor.flatten()[0] = float("nan")
    before = base_state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="not finite") as caught:
            merge()
        assert repr(last._where()) in str(caught.value)
        assert not any(layer.merged for _, layer in tuner_layers(model))
        for key, value in base_state(model).items():
            same(value, before[key])
    with torch.no_grad(), model.disable_adapter():
        same(model(x), layout.plain()(x))


@pytest.mark.parametrize(
    "method, name", [(m, n) for n, layout in LAYOUTS.items() for m in METHODS if forbidden(m, layout)]
)
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(method, name):
    layout = LAYOUTS[name]
    base, x = layout.model(), layout.x()
    with torch.no_grad():
        wanted = layout.model()(x)
    with pytest.raises(ValueError, match=forbidden(method, layout)):
        get_peft_model(base, config(method, layout))
    assert not list(tuner_layers(base)) and all(p.requires_grad for p in base.parameters())
    with torch.no_grad():
        same(base(x), wanted)


@pytest.mark.parametrize("method", ["lora", "dora", "lora-bias"])
def test_a_grouped_convolution_is_not_merged(method):
    model = adapted(method, LAYOUTS["conv-2d-grouped"])
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="groups=2"):
            merge()
    assert not any(layer.merged for _, layer in tuner_layers(model))


def test_a_rank_that_does_not_fit_the_groups_names_one_that_does():
    layout = LAYOUTS["conv-2d-grouped"]
    with pytest.raises(ValueError, match=r"r=3.*2 groups.*r=4"):
        get_peft_model(layout.model(), config("lora", layout, r=3))


@pytest.mark.parametrize("name", [n for n, layout in LAYOUTS.items() if layout.kind == "parameter"])
def test_a_bias_without_meaning_for_parameters_is_refused(name):
    layout = LAYOUTS[name]
    with pytest.raises(ValueError, match="lora_bias"):
        get_peft_model(layout.model(), config("lora", layout, lora_bias=True))


OTHER_DROPOUTS = ("rank_dropout", "boft_dropout")  # of what is learnt, not of what it is multiplied with
WITHOUT_DROPOUT = ("miss-bat", "supertuning", "supertuning-smallest", "supertuning-dora", "supra")


def dropouts(method: str) -> list[str]:
    """The fields of a method that drop features of its input."""
    if method in WITHOUT_DROPOUT:
        return []
    names = (f.name for f in dataclasses.fields(METHODS[method].config))
    names = (n for n in names if n.endswith("_dropout") and n not in OTHER_DROPOUTS)
    return [n for n in names if n != "module_dropout" or method.startswith("delora")]


PARAMETERS = cells(only=lambda layout: layout.kind == "parameter")


@pytest.mark.parametrize("method, name", [cell for cell in PARAMETERS if dropouts(cell[0])])
def test_dropout_of_what_a_parameter_is_multiplied_with_is_in_the_update_alone(method, name, monkeypatch):
    """A dropout that multiplies with a number shows where it acts; gains of DoRA are those of the whole update."""
    layout = LAYOUTS[name]
    (field,) = dropouts(method)
    model = adapted(method, layout, **{field: 0.5})
    for _, layer in tuner_layers(model):
        p, stack = layer.adapters["default"], layer.eval().stack(("default",))
        plain = stack.live_weight()
        with monkeypatch.context() as patch:
            patch.setattr("peft.kernels.masks.dropout", lambda x, rate: x * (1 - rate))
            layer.train()
            parts = stack.chosen()
            found = [stack.live_weight(), *(() if parts is None else (parts.whole(),))]
        base = layer.base_weight()
        if method.startswith("deft"):  # which takes a part of W out, of which nothing is dropped
            Q, taken = getattr(p.method, "of", p.method).removed(p)
            base = base - Q @ taken
        base = base * (p.method.gain(p)[..., None] if hasattr(p.method, "gain") else 1.0)
        for W in found:
            close(W, base + (plain - base) / 2, 1e-5)


def test_no_method_is_left_out_by_accident():
    assert set(FEW) | set(SUBTRACTING) <= set(METHODS)
    tested = {row.config for row in METHODS.values()}
    tuners = {kind: registry.tuner_class(kind) for kind in registry.METHODS}
    of_layers = [k for k, t in tuners.items() if getattr(t, "layer_classes", None) and not t.leads]
    assert tested == {registry.config_class(kind) for kind in of_layers}
