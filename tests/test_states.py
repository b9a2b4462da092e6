"""What torch is set to while a model is adapted: adapters are the same under every default, mode and random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune

import peft
from conformance.layouts import LAYOUTS
from conformance.rows import METHODS, adapted, config, forbidden, same, told, train, tuner_layers
from peft import ArrowConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.methods.lora.options import KasaConfig

PLACES = {m: next(n for n, layout in LAYOUTS.items() if forbidden(m, layout) is None) for m in METHODS}
each_method = pytest.mark.parametrize("method, name", PLACES.items())


@contextmanager
def other_defaults() -> Iterator[None]:
    """torch makes tensors of another kind, without memory, unless it is told what to make."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


STATES = {"as it is": nullcontext, "other defaults": other_defaults, "inference mode": torch.inference_mode}


def held(model):
    """Every tensor of the adapters, of the base and of what layers share, by a name of its own."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, layer in tuner_layers(model):
        found |= {f"{path} {slot.live}": slot.tensor for slot in layer.slots("default")}
    return {name: t.detach().clone() for name, t in found.items()}


def trained(model, x):
    """The output, and every gradient of a step; None where there is none."""
    torch.manual_seed(1)
    y = model.train()(x)
    y.square().sum().backward()
    return {"y": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


def run(method, name, state, folder):
    """What comes of making, training, saving and loading an adapter, of which all but training is under a state."""
    layout = LAYOUTS[name]
    x, base, other = layout.x(), layout.model(), layout.model()
    torch.manual_seed(0)
    with state():
        model = get_peft_model(base, config(method, layout))
    first = held(told(model, method, layout))
    train(model)
    with state():
        model.save_pretrained(folder)
        file = get_peft_model_state_dict(model)
        loaded = PeftModel.from_pretrained(other, folder, is_trainable=True)
    told(loaded, method, layout)
    return [first, file, held(loaded), trained(model, x), trained(loaded, x)]


@cache
def plain(method, name, folder):
    return run(method, name, nullcontext, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("state", ["other defaults", "inference mode"])
@each_method
def test_the_adapter_is_the_same_whatever_torch_is_set_to(method, name, state, folder):
    wanted = plain(method, name, folder / method)
    for there, here in zip(wanted, run(method, name, STATES[state], folder / f"{method} {state}"), strict=True):
        assert there.keys() == here.keys()
        for key, t in there.items():
            assert (t is None) is (here[key] is None), f"{key}: only one of them is trained"
            if t is not None:
                same(here[key], t)


@each_method
def test_a_model_that_has_run_in_inference_mode_can_be_trained(method, name):
    layout = LAYOUTS[name]
    x, models = layout.x(), [adapted(method, layout) for _ in range(2)]
    with torch.inference_mode():
        models[0](x)
    here, there = (trained(m, x) for m in models)
    for key, t in there.items():
        assert t is None or torch.equal(here[key], t), key


@each_method
def test_loading_evaluating_and_merging_draw_no_random_numbers(method, name, tmp_path):
    layout = LAYOUTS[name]
    x, model, other = layout.x(), adapted(method, layout), layout.model()
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    loaded = told(PeftModel.from_pretrained(other, tmp_path), method, layout)
    with torch.no_grad():
        loaded(x)
    if METHODS[method].merges:
        loaded.merge_adapter()
        loaded.unmerge_adapter()
    if not METHODS[method].alone:
        loaded.load_adapter(tmp_path, "other")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before[1:]


@pytest.mark.parametrize("more", [{}, {"kasa_config": KasaConfig()}], ids=["plain", "kasa"])
def test_arrow_routes_in_inference_mode_and_trains_afterwards(more):
    settings = {"r": 2, "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(**settings, **more), "expert").eval()
    for _, layer in tuner_layers(model):
        for slot in layer.slots("expert"):
            nn.init.normal_(slot.tensor, std=0.5)
    model.add_adapter("router", LoraConfig(**settings, arrow_config=ArrowConfig(top_k=1)))
    model.set_adapter("router")
    x = torch.randn(4, 6)
    with torch.inference_mode():
        found = model(x)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.sum().backward()
    assert torch.equal(y, found) and leaf.grad.any()
    with torch.no_grad():  # what was made of the factors before is not taken again
        for n, p in model.named_parameters():
            if "expert" in n:
                p.mul_(2)
        assert not torch.allclose(model(x), found)


@pytest.mark.parametrize("grad", [False, True])
@each_method
def test_a_run_with_fake_tensors_leaves_none_behind(method, name, grad):
    layout = LAYOUTS[name]
    x, model = layout.x(), adapted(method, layout)
    shape = layout.plain()(x).shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(grad):
        assert model(mode.from_tensor(x)).shape == shape
    with torch.no_grad():
        assert type(model(x)) is torch.Tensor
    assert type(trained(model, x)["y"]) is torch.Tensor


@pytest.mark.parametrize("compute", [parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.4)])
@pytest.mark.parametrize("method", ["dora", "deft", "lokr-dora", "psoft-dora", "osf-dora"])
def test_evaluation_follows_a_base_weight_that_is_computed_at_each_call(method, compute):
    layout = LAYOUTS["linear"]
    x, base = layout.x(), layout.model()
    compute(base.layer)
    model = get_peft_model(base, config(method, layout)).eval()
    train(model)
    with torch.no_grad():
        before = model(x)
        for name, t in model.named_parameters():
            if "original" in name or "weight_orig" in name:
                t.mul_(1.5).add_(0.1)
        after = model(x)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(after, model(x), atol=1e-5)


@pytest.mark.parametrize("method", ["lily", "velora", "velora-dora"])
@pytest.mark.parametrize("name", ["linear", "linear-Conv1D", "conv-2d"])
def test_a_batch_without_samples_gives_gradients_of_zero(method, name):
    layout = LAYOUTS[name]
    found = trained(adapted(method, layout), layout.x()[:0])
    assert found.pop("y").shape == layout.plain()(layout.x()[:0]).shape
    assert all(g is None or not g.any() for g in found.values())


@pytest.mark.parametrize("method, name", [("oft", "conv-2d"), ("hra", "conv-2d"), ("miss-bat", "linear")])
def test_under_autocast_the_answer_is_of_the_dtype_of_the_base_layers(method, name):
    layout = LAYOUTS[name]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted(method, layout)(layout.x()).dtype is layout.plain()(layout.x()).dtype is torch.bfloat16


LM = {"task_type": "CAUSAL_LM"}
ROWS = {"num_virtual_tokens": 2, **LM}
PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(**ROWS),
    "vocabulary": lambda: peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **ROWS),
    "prefix": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=4, **ROWS),
    "network": lambda: peft.PromptEncoderConfig(encoder_hidden_size=4, **ROWS),
    "recurrent": lambda: peft.PromptEncoderConfig(encoder_reparameterization_type="LSTM", **ROWS),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(num_tasks=2, num_ranks=1, **ROWS),
    "cpt": lambda: peft.CPTConfig(cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **LM),
    "cartridge": lambda: peft.CartridgeConfig(num_frozen_tokens=1, **ROWS),
    "adaption": lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **LM),
    "shadow": lambda: peft.ShadowConfig(**LM),
}


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)).eval()


@pytest.mark.filterwarnings("ignore:CPT")  # no word of the text is a label
@pytest.mark.parametrize("state", ["other defaults", "inference mode"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_too_are_the_same_whatever_torch_is_set_to(name, state, tmp_path):
    def run(state):
        base, other, found = language_model(), language_model(), []
        torch.manual_seed(1)
        with state():
            model = get_peft_model(base, PROMPTS[name]())
            found += [held(model)]
            model.save_pretrained(tmp_path)
            before = torch.get_rng_state()
            loaded = PeftModel.from_pretrained(other, tmp_path)
        assert torch.equal(before, torch.get_rng_state()), "loading draws random numbers"
        torch.manual_seed(2)  # of dropout
        ids = torch.arange(3, 7).view(1, -1)
        tasks = {"task_ids": torch.tensor([1])} if name == "multitask" else {}
        model.train()(input_ids=ids, labels=ids, **tasks).loss.backward()
        return [*found, held(loaded), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}]

    for there, here in zip(run(nullcontext), run(STATES[state]), strict=True):
        assert there.keys() == here.keys()
        for key, t in there.items():
            assert (t is None) is (here[key] is None), f"{key}: only one of them is trained"
            if t is not None:
                same(here[key], t)
