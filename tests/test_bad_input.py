"""Mistakes that users make, what they are told, and that nothing has changed afterwards.

Mistakes in a configuration alone are in test_config.py, in selections alone in test_targets.py, in files alone in
test_checkpoint.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import (
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.core.layer import tuner_layers
from peft.errors import PeftStrictError

WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.emb = nn.Embedding(9, 6)
        self.body.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        h = self.body.emb(tokens)
        for block in self.body.layers:
            h = h + block.norm(block.down(torch.relu(block.up(h))))
        return self.head(h)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["up"], "init_lora_weights": False, **changes})


# ---- models to begin with ------------------------------------------------------------------------------------------


def base() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def one(**changes: Any) -> PeftModel:
    return get_peft_model(base(), lora(**changes)).eval()


def two(**changes: Any) -> PeftModel:
    model = one(**changes)
    model.add_adapter("other", lora(**{"target_modules": ["up", "down"], **changes}))
    return model


def both(**changes: Any) -> PeftModel:
    model = two(**changes)
    model.base_model.set_adapter(["default", "other"])
    return model


def merged() -> PeftModel:
    model = two()
    model.merge_adapter()
    return model


def with_nan() -> nn.Module:
    model = base()
    with torch.no_grad():
        model.body.layers[1].up.weight[0, 0] = float("nan")
    return model


def sequence() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 3))


def wider() -> nn.Module:
    model = base()
    for block in model.body.layers:
        block.up, block.down = nn.Linear(6, 9), nn.Linear(9, 6)
    return model


# ---- mistakes ------------------------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    """What is done to which model, and the words of the error."""

    name: str
    start: Callable[[], Any]
    act: Callable[[Any, Path], Any]
    error: type[Exception]
    words: tuple[str, ...]


def wrap(name: str, error: type[Exception], words: tuple[str, ...], **fields: Any) -> Mistake:
    """A configuration that the model does not fit."""
    return Mistake(name, base, lambda m, _: get_peft_model(m, lora(**fields)), error, words)


def load(name: str, spoil: Callable[[dict], dict], error: type[Exception], words: tuple[str, ...]) -> list[Mistake]:
    """A file whose tensors are spoilt, loaded by a fresh model, as a new adapter and over an existing one."""

    def spoilt(folder: Path) -> Path:
        state = load_file(folder / "other" / WEIGHTS)
        save_file(spoil(state), folder / "other" / WEIGHTS)
        return folder / "other"

    return [
        Mistake(f"{name}, fresh", base, lambda m, f: PeftModel.from_pretrained(m, spoilt(f)), error, words),
        Mistake(f"{name}, new", one, lambda m, f: m.load_adapter(spoilt(f), "new"), error, words),
        Mistake(f"{name}, over", two, lambda m, f: m.load_adapter(spoilt(f), "other"), error, words),
    ]


def narrower(state: dict) -> dict:
    return {k: v[:, :1].contiguous() for k, v in state.items()}


NEAREST = ("'othr'", "Did you mean 'other'")
MISTAKES = [
    # configurations
    wrap("typo in a target", NoMatchingPeftModuleError, ("'dwon'", "Did you mean 'down'"), target_modules=["dwon"]),
    wrap("ending as a string", NoMatchingPeftModuleError, ("'up'", "['up']"), target_modules="up"),
    wrap("negative rank", ValueError, ("`r`", "-1", "at least 1"), r=-1),
    wrap("rank zero for one module", ValueError, ("`r`", "0", "at least 1"), module_config={"up": {"r": 0}}),
    wrap("alpha as text", TypeError, ("`lora_alpha`", "number", "'16'"), lora_alpha="16"),
    wrap("alpha NaN", ValueError, ("`lora_alpha`", "finite", "nan"), lora_alpha=float("nan")),
    wrap("alpha as text in a pattern", TypeError, ("alpha_pattern['up']", "'x'"), alpha_pattern={"up": "x"}),
    wrap("dropout as text", TypeError, ("`lora_dropout`", "number", "'0.1'"), lora_dropout="0.1"),
    wrap("flag as text", TypeError, ("`use_dora`", "True or False", "'no'"), use_dora="no"),
    wrap("patterns as a list", TypeError, ("`rank_pattern`", "dictionary", "[1]"), rank_pattern=[1]),
    wrap("no such layer", NoMatchingPeftModuleError, ("layers_to_transform=[7]", "0-1"), layers_to_transform=[7]),
    wrap("layer without a list", NoMatchingPeftModuleError, ("layers_pattern='blocks'", "'body.layers.0.up'"),
         layers_to_transform=[0], layers_pattern="blocks"),
    wrap("container as a target", ValueError, ("'layers'", "ModuleList", "nn.Linear", "exclude_modules"),
         target_modules=["layers"]),
    wrap("one target of two", ValueError, ("'norm'", "LayerNorm", "nn.Linear"), target_modules=["up", "norm"]),
    wrap("tokens that the vocabulary lacks", ValueError, ("trainable_token_indices", "[99]", "9 tokens", "0 to 8"),
         trainable_token_indices={"emb": [1, 99]}),
    wrap("a token twice", ValueError, ("trainable_token_indices", "token 3", "'body.emb'", "9 tokens", "twice"),
         trainable_token_indices={"emb": [3, 1, 3]}),
    wrap("a token from both ends", ValueError, ("trainable_token_indices", "token 3", "as 3 and as -6"),
         trainable_token_indices={"emb": [3, -6]}),
    wrap("tokens of a target", TypeError, ("trainable_token_indices", "'body.emb'", "exclude it from target_modules"),
         target_modules=["up", "emb"], trainable_token_indices={"emb": [1]}),
    wrap("tokens as text", TypeError, ("trainable_token_indices", "whole numbers", "['a']"),
         trainable_token_indices={"emb": ["a"]}),
    wrap("a tuple of tokens by name", TypeError, ("trainable_token_indices", "whole numbers", "3"),
         trainable_token_indices={"emb": 3}),
    wrap("tokens of no module", ValueError, ("'embb'", "Did you mean 'emb'"), trainable_token_indices={"embb": [1]}),
    wrap("PiSSA of a large rank", ValueError, ("r=100", "'body.layers.0.up'", "(8, 6)", "only 6", "rank_pattern"),
         init_lora_weights="pissa", r=100),
    wrap("orthogonal and odd", ValueError, ("even", "r=3", "r=4"), init_lora_weights="orthogonal", r=3),
    wrap("a later variant", NotImplementedError, ("use_qalora=True", "Leave it out"), use_qalora=True),
    Mistake("NaN under PiSSA", with_nan, lambda m, _: get_peft_model(m, lora(init_lora_weights="pissa")), ValueError,
            ("'pissa'", "'body.layers.1.up'", "NaN", "init_lora_weights=True")),
    # arguments
    Mistake("a dictionary", base, lambda m, _: get_peft_model(m, {"r": 2}), TypeError,
            ("peft_config", "LoraConfig(r=8)", "dict", "get_peft_config")),
    Mistake("arguments swapped", base, lambda m, _: get_peft_model(lora(), m), TypeError, ("model", "LoraConfig")),
    Mistake("arguments of an injection swapped", base, lambda m, _: inject_adapter_in_model(m, lora()), TypeError,
            ("model", "LoraConfig")),
    Mistake("the name of a model", base, lambda m, _: get_peft_model("gpt2", lora()), TypeError,
            ("str", "Load the base")),
    Mistake("the abstract configuration", base, lambda m, _: get_peft_model(m, PeftConfig()), ValueError,
            ("peft_type", "None", "LORA")),
    Mistake("no configuration", one, lambda m, _: m.add_adapter("new", None), TypeError, ("peft_config", "NoneType")),
    Mistake("arguments of add_adapter swapped", one, lambda m, _: m.add_adapter(lora(), "new"), TypeError,
            ("name", "string", "LoraConfig")),
    Mistake("an unknown field", base, lambda m, _: get_peft_model(m, lora(ranks=3)), TypeError, ("ranks",)),
    # names
    Mistake("a dot while loading", base, lambda m, f: PeftModel.from_pretrained(m, f, adapter_name="a.b"), ValueError,
            ("'a.b'", "dot", "'a_b'")),
    Mistake("a dot in a new name", one, lambda m, f: m.load_adapter(f, "a.b"), ValueError, ("'a.b'", "dot", "'a_b'")),
    Mistake("a dot in an injection", base, lambda m, _: inject_adapter_in_model(lora(), m, "a.b"), ValueError,
            ("'a.b'", "'a_b'")),
    Mistake("a duplicate injection", one, lambda m, _: inject_adapter_in_model(lora(), m.get_base_model()), ValueError,
            ("'default'", "another name")),
    Mistake("unknown among several to set", two, lambda m, _: m.base_model.set_adapter(["default", "othr"]), ValueError,
            (*NEAREST, "'default'")),
    Mistake("set by attribute", two, lambda m, _: setattr(m, "active_adapter", "othr"), ValueError, NEAREST),
    Mistake("set twice", two, lambda m, _: m.base_model.set_adapter(["other", "other"]), ValueError,
            ("'other'", "listed twice")),
    Mistake("unknown to delete", two, lambda m, _: m.delete_adapter("othr"), ValueError, (*NEAREST, "'default'")),
    Mistake("unknown to merge", two, lambda m, _: m.merge_adapter(["othr"]), ValueError, (*NEAREST, "merge")),
    Mistake("unknown to merge for good", two, lambda m, _: m.merge_and_unload(adapter_names=["othr"]), ValueError,
            NEAREST),
    Mistake("text to merge", two, lambda m, _: m.merge_adapter("other"), TypeError, ("adapter_names", "['other']")),
    Mistake("text to merge for good", two, lambda m, _: m.merge_and_unload(adapter_names="other"), TypeError,
            ("adapter_names", "['other']")),
    Mistake("merged with itself", two, lambda m, _: m.merge_adapter(["other", "other"]), ValueError, ("listed twice",)),
    Mistake("unknown to train", two, lambda m, _: m.set_requires_grad("othr"), ValueError, NEAREST),
    Mistake("unknown to list", two, lambda m, _: m.adapter_parameters("othr"), ValueError, NEAREST),
    Mistake("unknown to read", two, lambda m, _: get_peft_model_state_dict(m, adapter_name="othr"), ValueError,
            NEAREST),
    Mistake("text for a tensor", two, lambda m, _: set_peft_model_state_dict(m, {"x": "y"}), TypeError,
            ("{'x': 'str'}", "Nothing was loaded")),
    Mistake("text to save", two, lambda m, f: m.save_pretrained(f, selected_adapters="other"), TypeError,
            ("selected_adapters", "['other']")),
    # states
    Mistake("delete while merged", merged, lambda m, _: m.delete_adapter("default"), ValueError,
            ("'default'", "merged", "unmerge_adapter()")),
    Mistake("load while merged", merged, lambda m, f: m.load_adapter(f, "default"), ValueError,
            ("'default'", "merged", "Unmerge")),
    Mistake("merge the second of two DoRA", lambda: both(use_dora=True), lambda m, _: m.merge_adapter(["other"]),
            ValueError, ("['other']", "['default']", "Merge the first")),
    Mistake("two copies of a module at once", lambda: two(modules_to_save=["head"]),
            lambda m, _: m.base_model.set_adapter(["default", "other"]), ValueError,
            ("'head'", "Only one", "one of them")),
    Mistake("biases trained twice", lambda: one(bias="all"), lambda m, _: m.add_adapter("new", lora(bias="all")),
            ValueError, ("['default']", "'new'", "bias='none'")),
    Mistake("a second adapter that half fits", one,
            lambda m, _: m.add_adapter("new", lora(target_modules=["down", "norm"])),
            ValueError, ("'norm'", "LayerNorm")),
    Mistake("layers rebuilt under an adapter", one,
            lambda m, _: m.add_adapter("new", lora(layer_replication=[(0, 2), (0, 1)])),
            ValueError, ("layer_replication=[(0, 2), (0, 1)]", "is not replicated", "fresh base model")),
    Mistake("a model that cannot generate", one, lambda m, _: m.generate(TOKENS), AttributeError, ("Net", "generate")),
    # files
    Mistake("no such adapter", base, lambda m, f: PeftModel.from_pretrained(m, f, subfolder="othr"), ValueError,
            ("adapter_config.json", "othr")),
    Mistake("no such folder", one, lambda m, f: m.load_adapter(str(f / "none"), "new"), ValueError,
            ("adapter_model.safetensors", "no such folder")),
    Mistake("another kind of base", sequence, lambda m, f: PeftModel.from_pretrained(m, f), NoMatchingPeftModuleError,
            ("'up'", "Sequential", "'0', '1'")),
    Mistake("a wider base", wider, lambda m, f: PeftModel.from_pretrained(m, f), RuntimeError,
            ("size mismatch", "layers.0.up.lora_B.weight", "(8, 2) in the checkpoint", "(9, 2) in the model")),
    *load("other shapes", narrower, RuntimeError, ("size mismatch", "layers.0.down.lora_A.weight", "base model")),
    *load("integers", lambda s: {k: v.int() for k, v in s.items()}, TypeError,
          ("torch.int32", "torch.float32", "lora_A")),
    *load("complex numbers", lambda s: {k: v.to(torch.complex64) for k, v in s.items()}, TypeError,
          ("torch.complex64",)),
    *load("keys of another model", lambda s: {f"h.{i}.attn.weight": v for i, v in enumerate(s.values())}, ValueError,
          ("nothing was loaded", "'h.0.attn.weight'", "key_mapping")),
]  # fmt: skip


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a user could notice: tree, modes, parameters and their flags and ties, numbers, adapters, output."""
    with torch.no_grad():
        output = model(TOKENS)
    return {
        "tree": [(name, type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        "configurations": {n: c.to_dict() for n, c in getattr(model, "peft_config", {}).items()},
        "layers": [
            (path, layer.active_adapters, layer.disable_adapters, list(layer.merged_adapters))
            for path, layer in tuner_layers(model)
        ],
        "tensors": {k: v.clone() for k, v in model.state_dict().items()} | {"output": output},
    }


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Also where both are NaN."""
    return x.dtype is y.dtype and x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    old, new = before.pop("tensors"), after.pop("tensors")
    assert after == before
    assert new.keys() == old.keys()
    assert [k for k in old if not same_bits(old[k], new[k])] == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_a_mistake_is_explained_and_changes_nothing(mistake, tmp_path):
    two().save_pretrained(tmp_path)
    model = mistake.start()
    before = snapshot(model)
    with pytest.raises(mistake.error) as caught:
        mistake.act(model, tmp_path)
    text = str(caught.value)
    assert [word for word in mistake.words if word not in text] == [], text
    assert_unchanged(before, model)


RIGHT = {base: lambda m: get_peft_model(m, lora()), one: lambda m: m.add_adapter("new", lora(r=3))}


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.start in RIGHT], ids=lambda m: m.name)
def test_after_a_mistake_the_right_call_gives_what_it_gives_at_once(mistake, tmp_path):
    two().save_pretrained(tmp_path)
    spoilt, fresh = mistake.start(), mistake.start()
    with pytest.raises(mistake.error):
        mistake.act(spoilt, tmp_path)
    states = []
    for model in (spoilt, fresh):
        torch.manual_seed(1)
        RIGHT[mistake.start](model)
        states.append(model.state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][k], v) for k, v in states[1].items())
    assert torch.equal(spoilt(TOKENS), fresh(TOKENS))


def test_a_layer_without_a_shape_is_refused_and_left_alone_beside_a_target():
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4))
    for targets in (["1"], "all-linear"):
        with pytest.raises(ValueError, match=r"'1', a LazyLinear whose weight has no shape yet. Run the model once"):
            get_peft_model(model, lora(target_modules=targets))
    assert [type(m) for m in model] == [nn.Linear, nn.LazyLinear]
    assert all(p.requires_grad for p in model.parameters())
    get_peft_model(model, lora(target_modules=["0"]))
    assert model(torch.ones(2, 3)).shape == (2, 4)
    assert not model[1].weight.requires_grad


def test_a_bias_of_separate_attention_weights_is_refused_with_the_reason():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})
    with pytest.raises(ValueError, match=r"'q_proj_weight', one of the separate .* nn.MultiheadAttention with kdim or"):
        get_peft_model(model, lora(target_modules=["attn"], lora_bias=True))
    assert type(model["attn"]) is nn.MultiheadAttention


def test_an_alpha_of_zero_is_told():
    with pytest.warns(peft.PeftWarning, match="`lora_alpha` is 0"):
        lora(lora_alpha=0)


@pytest.mark.parametrize("kind", [peft.OFTConfig, peft.PsoftConfig])
def test_a_series_of_one_term_is_told(kind, recwarn):
    with pytest.warns(peft.PeftWarning, match="num_cayley_neumann_terms=1 .*not trained. Use more terms") as told:
        kind(use_cayley_neumann=True, num_cayley_neumann_terms=1)
    assert told[0].filename == __file__
    kind(use_cayley_neumann=False, num_cayley_neumann_terms=1)
    if kind is peft.PsoftConfig:
        kind(use_cayley_neumann=True, num_cayley_neumann_terms=1, psoft_orth=False)
    assert not recwarn.list


@pytest.mark.parametrize("again", [[[0, 2], [1, 2]], ((0, 2), (1, 2))])
def test_a_second_adapter_may_repeat_the_replication_of_the_first_but_ask_for_no_other(again):
    model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(2))})
    model = get_peft_model(model, lora(layer_replication=[(0, 2), (1, 2)]))
    model.add_adapter("other", lora(layer_replication=again))
    model.add_adapter("plain", lora())
    assert len(list(tuner_layers(model))) == 3
    with pytest.raises(ValueError, match=r"layer_replication=\[\(0, 1\)\] .* was rebuilt with \[\(0, 2\), \(1, 2\)\]"):
        model.add_adapter("more", lora(layer_replication=[(0, 1)]))


class Int8(nn.Linear):
    """A layer that keeps its weight as integers and a scale, as a quantiser that the library does not know would."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features)
        self.scale = layer.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def integers() -> nn.Module:
    model = base()
    model.body.layers[0].up = Int8(model.body.layers[0].up)
    return model


def test_integers_are_not_taken_for_the_weights_they_stand_for():
    """LoRA needs the layer's forward alone; DoRA and merging need the numbers."""
    plain = integers()
    want = plain(TOKENS)
    model = get_peft_model(plain, lora())
    with model.disable_adapter():
        assert torch.equal(model(TOKENS), want)
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"'weight' of Int8 is stored as torch\.int8"):
            merge()
        assert_unchanged(dict(before), model)
    fresh = integers()
    before = snapshot(fresh)
    with pytest.raises(NotImplementedError, match=r"torch\.int8"):
        get_peft_model(fresh, lora(use_dora=True))
    assert_unchanged(before, fresh)


DOUBTS: list[tuple[str, Callable[[], Any], Callable[[Any], Any], str]] = [
    ("merge again", merged, lambda m: m.merge_adapter(), "already merged"),
    ("unmerge what is not merged", two, lambda m: m.unmerge_adapter(), "Already unmerged"),
]


@pytest.mark.parametrize(("name", "start", "act", "text"), DOUBTS, ids=[d[0] for d in DOUBTS])
def test_what_has_nothing_to_do_says_so_and_changes_nothing(name, start, act, text):
    model = start()
    before = snapshot(model)
    with pytest.warns(UserWarning, match=text):
        act(model)
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["up", "dwon"]}, ("target_modules", "'dwon'", "Did you mean 'down'")),
        ({"rank_pattern": {"upp": 4}}, ("rank_pattern", "'upp'", "Did you mean 'up'")),
        ({"alpha_pattern": {"down": 4}}, ("alpha_pattern", "'down'")),
        ({"module_config": {"dwon": {"r": 4}}}, ("module_config", "'dwon'")),
        ({"modules_to_save": ["haed"]}, ("modules_to_save", "'haed'", "Did you mean 'head'")),
        ({"layers_to_transform": [0, 7]}, ("layers_to_transform", "[7]", "0-1")),
    ],
)
def test_what_selects_nothing_warns_once_and_is_refused_whole_when_strict(fields, words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(base(), lora(**fields))
    text = [str(w.message) for w in caught if issubclass(w.category, peft.UnmatchedTargetWarning)]
    assert len(text) == 1 and all(word in text[0] for word in words), text
    model = base()
    before = snapshot(model)
    was = peft.set_strict(True)
    try:
        with pytest.raises(PeftStrictError):
            get_peft_model(model, lora(**fields))
    finally:
        peft.set_strict(was)
    assert_unchanged(before, model)


def test_a_plan_of_what_is_no_model_names_the_way_to_one():
    with pytest.raises(ValueError, match=r"model is a dict\. Pass a torch model, or a configuration of transformers"):
        peft.plan({"hidden_size": 8}, lora(target_modules=["0"]))
