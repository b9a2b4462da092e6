"""A file that holds just what the molds of an adapter say is poured into it, and it is as if it had been filled."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import test_recall as recall
from benchmarks.measure import calls
from peft import LoraConfig, PeftModel, get_peft_model, loading
from peft.core.deferred import Deferred
from peft.core.recall import Recipes

WEIGHTS = recall.WEIGHTS
CASES = {
    **recall.CASES,
    "another start": ({"init_lora_weights": True}, {}),
    "one form": ({"target_modules": ["up"]}, {}),
    "a regular expression": ({"target_modules": r".*\.(up|down)"}, {}),
}


@pytest.fixture
def poured(monkeypatch):
    """How many layers each load has poured its file into; None where it went the long way."""
    found, real = [], loading.pouring_of

    def told(*args):
        pouring = real(*args)
        found.append(pouring and len(pouring.jobs))
        return pouring

    monkeypatch.setattr(loading, "pouring_of", told)
    return found


@pytest.fixture
def the_long_way(monkeypatch):
    """Makes loads go the long way from now on."""
    return lambda: monkeypatch.setattr(loading, "pouring_of", lambda *args: None)


def models(tmp_path, settings, options, training, the_long_way):
    """Two models with two adapters of different kinds each, the second of them filled the long way."""
    dtype, options = settings.get("dtype", torch.float32), dict(options)
    recall.save(tmp_path / "a", 1, **settings), recall.save(tmp_path / "b", 2, **{**settings, "r": 4})
    device = {"torch_device": options.pop("torch_device", None)}
    for way in ("short", "long"):
        if way == "long":
            the_long_way()
        model = PeftModel.from_pretrained(recall.base(dtype=dtype).train(training), tmp_path / "a", **options)
        model.train(training) if options.get("is_trainable") else None
        assert not any(map(any, model.load_adapter(tmp_path / "b", "b", **options, **device)))
        yield model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("follow")
def test_it_is_as_if_it_had_been_filled(tmp_path, poured, the_long_way, case, training):
    one, two = models(tmp_path, *CASES[case], training, the_long_way)
    assert poured == [2 if case == "one form" else 4] * 2
    assert recall.facts(one) == recall.facts(two)
    for name in ("b", "default"):
        assert all(map(torch.equal, recall.answers(one, name), recall.answers(two, name)))
    for model, place in ((one, "one"), (two, "two")):
        model.save_pretrained(tmp_path / place)
    for file in (WEIGHTS, recall.CONFIG, f"b/{WEIGHTS}"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert len(Recipes.of(one.base_model)) == len(Recipes.of(two.base_model)) == 2
    for model in (one, two):
        model.load_adapter(tmp_path / "b", "c")
    assert recall.facts(one) == recall.facts(two)
    assert all(map(torch.equal, recall.answers(one, "c"), recall.answers(two, "c")))


follow = recall.follow


def lacking(state):
    state.popitem()


def more(state):
    state["base_model.model.0.other.lora_A.weight"] = torch.ones(2, 6)


def other_shape(state):
    key = next(iter(state))
    state[key] = torch.ones(3, *state[key].shape[1:])


def integers(state):
    key = next(iter(state))
    state[key] = state[key].to(torch.int64)


def another_name(state):
    for key in list(state):
        state[key.replace("model.0.", "model.first.0.").replace("model.1.", "model.first.1.")] = state.pop(key)


def without_prefix(state):
    for key in list(state):
        state[key.removeprefix("base_model.model.")] = state.pop(key)


EDITS = [lacking, more, other_shape, integers, another_name, without_prefix]


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_what_a_file_has_beside_that_is_said_as_ever(tmp_path, poured, the_long_way, edit):
    state = load_file(recall.save(tmp_path / "a") / WEIGHTS)
    edit(state)
    save_file(state, tmp_path / "a" / WEIGHTS)
    found = []
    for way in ("short", "long"):
        if way == "long":
            the_long_way()
        base, said = recall.base(), []
        before = [m for m in base.modules()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                torch.manual_seed(0)
                found.append(recall.answers(PeftModel.from_pretrained(base, tmp_path / "a"), "default"))
            except (RuntimeError, TypeError, ValueError) as error:
                said.append(repr(error))
                assert [m for m in base.modules()] == before
                found.append([])
        found.append(said + [str(w.message) for w in caught])
    assert all(map(torch.equal, found[0], found[2])) and found[1] == found[3]
    assert found[1] or edit is without_prefix
    assert set(poured) <= {None}


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["norm"]},
        {"bias": "lora_only"},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": ["up"], "trainable_token_indices": {"words": [0]}},
    ],
    ids=str,
)
def test_an_adapter_that_is_more_goes_the_long_way(tmp_path, poured, settings):
    def base():
        torch.manual_seed(0)
        model = recall.base()
        model.words = nn.Embedding(3, 6)
        return model

    one = get_peft_model(base(), LoraConfig(**{"r": 2, "target_modules": ["up", "down"], **settings}))
    one.save_pretrained(tmp_path)
    two = PeftModel.from_pretrained(base(), tmp_path)
    assert set(poured) <= {None} and not any(p.is_meta for p in two.parameters())
    state = one.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in two.state_dict().items())


def test_damage_and_a_faulty_adapter_leave_the_model_as_it_was(tmp_path, poured):
    file = recall.save(tmp_path / "a") / WEIGHTS
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    base = recall.base().train()
    before, flags = list(base.named_modules()), [m.training for m in base.modules()]
    with pytest.raises(ValueError, match="damaged"):
        PeftModel.from_pretrained(base, tmp_path / "a")
    assert list(base.named_modules()) == before and [m.training for m in base.modules()] == flags and poured == [4]
    assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")


@pytest.mark.usefixtures("no_garbage")
def test_a_load_takes_few_calls_for_each_layer(tmp_path, monkeypatch):
    """Of Python and C functions, with all that is made for the layers and remembered of them."""
    monkeypatch.setattr(Deferred, "at_once", False)  # as in a process that has compiled nothing yet
    counts = []
    for blocks in (4, 20):
        recall.save(tmp_path / str(blocks), blocks=blocks)
        for _ in range(3):  # what is made once for a process is there then
            base = recall.base(blocks)
            counts.append(calls(lambda b=base, n=blocks: PeftModel.from_pretrained(b, tmp_path / str(n))))
    assert (counts[5] - counts[2]) / 32 <= 125


no_garbage = recall.no_garbage
