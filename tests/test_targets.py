"""What a configuration selects in a model, and what it is told when it selects nothing."""

from __future__ import annotations

import json
import re
import time
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

import peft
from peft import LoraConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.core.pattern import Selector, Table, suffixes
from peft.core.plan import compact
from peft.core.replicate import order_of, replicate
from peft.core.targets import inspect_matched_modules, match, pattern_value, plan, settings
from peft.errors import NoMatchingPeftModuleError, PeftStrictError, UnmatchedTargetWarning


@dataclass
class Config:
    """The fields that matching reads."""

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    target_parameters: Any = None
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    module_config: Any = None
    trainable_token_indices: Any = None
    ensure_weight_tying: bool = False
    bias: str = "none"
    task_type: Any = None
    peft_type: str = "LORA"
    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: Any = True


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4, device="meta") for _ in range(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.up = nn.Linear(4, 6, device="meta")
        self.down = nn.Linear(6, 4, bias=False, device="meta")
        self.norm = nn.LayerNorm(4, device="meta")


class Model(nn.Module):
    def __init__(self, layers: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4, device="meta")
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(Block() for _ in range(layers))
        self.lm_head = nn.Linear(4, 10, bias=False, device="meta")
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, 8, 4, device="meta"))
        self.down = nn.Parameter(torch.empty(2, 4, 8, device="meta"))
        self.scale = nn.Parameter(torch.empty(2, device="meta"))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2, device="meta")
        self.experts = Experts()
        self.own = nn.Parameter(torch.empty(4, 4, device="meta"))


class TunerLayer(nn.Module):
    """What a layer that has adapters looks like to matching."""

    adapter_layer_names = ("lora_A",)

    def __init__(self, base: nn.Module, parameter_name: str | None = None) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, device="meta")})
        self.parameter_name = parameter_name


class SavedCopy(nn.Module):
    """What a module with a trained copy looks like to matching."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original

    def unload_and_optionally_merge_module(self) -> None: ...


def names(model: nn.Module, **fields: Any) -> list[str]:
    return [target.name for target in match(model, Config(**fields)).targets]


def layers(*ends: str, count: int = 3) -> list[str]:
    return [f"body.layers.{i}.{end}" for i in range(count) for end in ends]


LINEAR = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "up", "down")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, layers("attn.q_proj")),
        ({"target_modules": ["down", "attn.k_proj"]}, layers("attn.k_proj", "down")),
        ({"target_modules": ["body.layers.1.up"]}, ["body.layers.1.up"]),
        ({"target_modules": {"lm_head", "embed_tokens"}}, ["embed_tokens", "lm_head"]),
        ({"target_modules": r".*\.[01]\..*(q|v)_proj"}, layers("attn.q_proj", "attn.v_proj", count=2)),
        ({"target_modules": r"body.*", "exclude_modules": r"body(\.layers(\.\d+(\.attn|\.norm)?)?)?"},
         layers(*LINEAR)),
        ({"target_modules": "all-linear"}, layers(*LINEAR)),
        ({"target_modules": "ALL-LINEAR", "exclude_modules": ["attn.q_proj"]}, layers(*LINEAR[1:])),
        ({"target_modules": ["q_proj", "up"], "exclude_modules": ["layers.0.up"]},
         [n for n in layers("attn.q_proj", "up") if n != "body.layers.0.up"]),
        ({"target_modules": ["q_proj", "up"], "exclude_modules": r".*\.up"}, layers("attn.q_proj")),
        ({"target_modules": "all-linear", "modules_to_save": ["attn"]}, layers("up", "down")),
        ({"target_modules": "all-linear", "modules_to_save": ["layers.0"]},
         [n for n in layers(*LINEAR) if ".0." not in n]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, ["body.layers.1.attn.q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
         ["body.layers.0.attn.q_proj", "body.layers.2.attn.q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
         ["body.layers.0.attn.q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, layers("attn.q_proj")),
        ({"target_modules": ["body.layers.2.up", "down"], "layers_to_transform": [0]},
         ["body.layers.0.down", "body.layers.2.up"]),
    ],
)  # fmt: skip
def test_a_selection_finds_its_modules_in_the_models_order(fields, expected):
    assert names(Model(), **fields) == expected


@pytest.mark.parametrize(
    ("path", "pattern", "layer"),
    [
        ("layers.0.layers.1.q", None, 1),
        ("layers.0.layers.1.q", "layers", 0),
        ("a.b.0.c.d.1.q", None, 0),
        ("model.0.x.1.q", None, 1),
        ("0.1.2.q", None, 2),
        ("a.layers.2.layers.3.q", "layers", 2),
        ("layers.5.q", "layers", 5),
        ("h.5.attn.q", None, 5),
        ("xlayers.5.q", "layers", None),
        ("a.h.1.b.layers.2.q", ["layers", "h"], 2),
    ],
)
def test_the_layer_index_is_read_from_the_name(path, pattern, layer):
    model = nn.Module()
    place = model
    *parents, last = path.split(".")
    for part in parents:
        place._modules[part] = nn.Module()
        place = place._modules[part]
    place._modules[last] = nn.Linear(2, 2, device="meta")
    for index in range(6):
        fields = {"target_modules": [last], "layers_to_transform": [index], "layers_pattern": pattern}
        if index == layer:
            assert names(model, **fields) == [path]
        else:
            with pytest.raises(NoMatchingPeftModuleError, match="layers_to_transform"):
                match(model, Config(**fields))


@pytest.mark.parametrize("wanted", [["linear"], ["Linear"], "all-linear", [""], "linear"])
def test_a_model_that_is_one_layer_is_a_target(wanted):
    assert [t.path for t in match(nn.Linear(3, 4), Config(target_modules=wanted)).targets] == [""]


def test_a_shared_module_is_found_once_under_its_first_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.append(model[0])
    assert names(model, target_modules="all-linear") == ["0"]


def test_the_placeholder_for_no_targets_selects_nothing_silently():
    assert len(match(Model(), Config(target_modules="dummy-target-modules"))) == 0


def test_matching_changes_neither_model_nor_configuration():
    model, config = Model(tied=True), Config(target_modules="all-linear", rank_pattern={"up": 2})
    modules, fields = dict(model.named_modules()), dict(vars(config))
    match(model, config)
    assert dict(model.named_modules()) == modules
    assert vars(config) == fields


# Defaults


def test_targets_default_to_those_of_the_models_type():
    model = Model()
    for kind in (SimpleNamespace(model_type="llama"), {"model_type": "llama"}):
        model.config = kind
        found = match(model, Config())
        assert found.module_names == layers("attn.q_proj", "attn.v_proj")
        assert found.target_modules == {"q_proj", "v_proj"}
        assert "llama" in found.targets[0].reason


def test_a_model_without_defaults_needs_target_modules():
    with pytest.raises(ValueError, match=r"(?s)target_modules.*'custom'.*'q_proj'"):
        match(Model(), Config())


# Errors


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"target_modules": ["q_prj"]}, NoMatchingPeftModuleError, "'q_prj' .Did you mean 'q_proj'"),
        ({"target_modules": "all_linear"}, NoMatchingPeftModuleError, "Did you mean 'all-linear'"),
        ({"target_modules": ["attn.q_prj"]}, NoMatchingPeftModuleError, "Did you mean 'attn.q_proj'"),
        ({"target_modules": "q_proj"}, NoMatchingPeftModuleError, r"whole name.*\['q_proj'\]"),
        ({"target_modules": [".*q_proj"]}, NoMatchingPeftModuleError, "not regular expressions"),
        ({"target_modules": []}, NoMatchingPeftModuleError, "nothing to adapt"),
        ({"target_modules": ["up"], "exclude_modules": ["up"]}, NoMatchingPeftModuleError, "All 3 .*exclude"),
        ({"target_modules": ["up"], "modules_to_save": ["up"]}, NoMatchingPeftModuleError, "modules_to_save"),
        ({"target_modules": ["up"], "layers_to_transform": [7]}, NoMatchingPeftModuleError, "layers 0-2"),
        ({"target_modules": ["attn"]}, ValueError, "'body.layers.0.attn'.*Attention is not supp.*Linear"),
        ({"target_modules": ["norm"]}, ValueError, "LayerNorm is not supported"),
        ({"target_modules": "(q"}, ValueError, "not a regular expression"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, ValueError, "layers_to_transform"),
        ({"target_modules": [], "target_parameters": ["q_proj.wieght"]}, NoMatchingPeftModuleError,
         "Did you mean"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_raises_and_says_why(fields, error, text):
    with pytest.raises(error, match=text):
        match(Model(), Config(**fields))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"target_modules": ["q_proj", "v_prj", "qq"]},
            "target_modules.*'qq'.*'v_prj' .Did you mean 'v_proj'",
        ),
        ({"exclude_modules": ["k_prj"]}, "exclude_modules.*Did you mean 'k_proj'"),
        ({"exclude_modules": "nothing.*"}, "exclude_modules.*'nothing.*'"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save.*Did you mean 'lm_head'"),
        ({"rank_pattern": {"q_prj": 4, "q_proj": 2}}, "rank_pattern.*'q_prj' .Did you mean 'q_proj'"),
        ({"alpha_pattern": {"up": 4}}, "alpha_pattern.*'up'"),
        ({"module_config": {"up": {"r": 4}}}, "module_config.*'up'"),
        ({"layers_to_transform": [0, 9]}, r"layers_to_transform.*\[9\].*0-2"),
        ({"target_parameters": ["up.wait"]}, "target_parameters.*'up.wait' .Did you mean"),
    ],
)
def test_an_entry_that_selects_nothing_warns_or_raises_if_strict(fields, text):
    config = Config(**{"target_modules": ["q_proj"], **fields})
    with pytest.warns(UnmatchedTargetWarning, match=text) as caught:
        match(Model(), config)
    assert len(caught) == 1
    with pytest.raises(PeftStrictError, match=text):
        match(Model(), config, strict=True)


def test_heads_that_task_classes_add_and_entries_that_are_excluded_do_not_warn():
    match(Model(), Config(["q_proj", "up"], ["up"], ["classifier", "score", "qa_outputs"]), strict=True)


def test_all_linear_leaves_out_what_it_cannot_adapt_and_says_so():
    model = Model()
    model.config = SimpleNamespace(model_type="mamba")
    model.out_proj = nn.Linear(4, 4, device="meta")
    found = match(model, Config("all-linear"))
    skipped = dict(found.skipped)
    assert skipped["lm_head"] == "output head"
    assert "mamba" in skipped["out_proj"]
    with pytest.raises(ValueError, match="mamba"):
        match(model, Config(["out_proj"]))


def test_routers_that_call_themselves_linear_are_left_out_and_their_weights_adapted():
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    config = transformers.PhimoeConfig(**sizes, num_key_value_heads=2, num_local_experts=4, pad_token_id=0)
    model, ids = transformers.PhimoeForCausalLM(config).eval(), torch.tensor([[3, 4, 5]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmatchedTargetWarning)  # of the experts
        found = plan(model, LoraConfig(target_modules="all-linear"))
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    path = "model.layers.0.mlp.router"
    assert dict(found.skipped)[path].startswith("PhimoeTopKRouter gives the routes")
    assert torch.isfinite(adapted(ids).logits).all()
    with pytest.raises(ValueError, match=rf"PhimoeTopKRouter gives .* target_parameters=\['{path}.weight'\]"):
        match(adapted.unload(), LoraConfig(target_modules=["router"]))


def test_weights_that_mixers_read_past_their_modules_are_left_out_or_told():
    config = transformers.MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=2, vocab_size=16)
    with torch.device("meta"):
        model = transformers.MambaForCausalLM(config)
    found = match(model, LoraConfig(target_modules="all-linear"))
    assert dict(found.skipped)["backbone.layers.1.mixer.dt_proj"].startswith("the mixer around it reads its weight")
    assert not any("dt_proj" in name for name in found.module_names)
    with pytest.warns(UnmatchedTargetWarning, match=r"target_modules selects '.*dt_proj', .* Leave 'dt_proj' out"):
        assert len(match(model, LoraConfig(target_modules=["dt_proj"]))) == 2


def grouped(rows):
    """A model with a block diagonal layer, as transformers' DeepSeek-V4 has it: an nn.Linear by name alone."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.blocks = nn.Linear(12, 12), DeepseekV4GroupedLinear(6, 8, 2)

        def forward(self, x):
            return self.blocks(self.first(x).unflatten(-1, (2, 6))).flatten(-2)

    return Model(), torch.randn(rows, 12)


def test_block_diagonal_layers_are_no_linear_ones_and_their_weights_are_adapted():
    model, x = grouped(2)  # as many rows as groups
    with pytest.raises(ValueError, match=r"DeepseekV4GroupedLinear multiplies groups .*\['blocks.weight'\]"):
        match(model, Config(["blocks"]))
    assert match(model, Config("all-linear")).module_names == ["first"]
    fields = {"target_modules": [], "target_parameters": ["blocks.weight"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(r=2, **fields)).eval()
    with torch.no_grad():
        wanted = model(x)
        with model.disable_adapter():
            assert not torch.allclose(model(x), wanted)
        model.merge_adapter()
        torch.testing.assert_close(model(x), wanted)


def test_the_callback_decides_what_is_supported():
    found = match(Model(), Config(["norm", "up"]), supported=lambda m: isinstance(m, nn.LayerNorm | nn.Linear))
    assert found.module_names == layers("up", "norm")


# Models that have adapters


def test_a_second_adapter_targets_the_layer_of_the_first_and_nothing_below_it():
    model = Model()
    block = model.body.layers[0]
    block.up = TunerLayer(block.up)
    for wanted in ("all-linear", ["up", "default", "base_layer"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnmatchedTargetWarning)
            found = match(model, Config(wanted))
        assert "body.layers.0.up" in found.module_names
        assert not [n for n in found.module_names if "base_layer" in n or "default" in n]
    assert match(TunerLayer(nn.Linear(2, 2)), Config(["linear"])).module_names == [""]


def test_a_module_with_a_trained_copy_is_no_target():
    model = Model()
    model.body.extra = SavedCopy(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="trains a copy"):
        match(model, Config(["extra"]))
    assert "body.extra" in dict(match(model, Config("all-linear")).skipped)


def test_inspection_sorts_all_modules():
    tuner = SimpleNamespace(model=Model(1), peft_config={"default": Config(["up", "down"], ["down"])})
    result = inspect_matched_modules(tuner)
    assert result["matched"] == ["body.layers.0.up"]
    assert len(result["unmatched"]) == len(list(tuner.model.named_modules())) - 1


# Parameters


def test_parameters_are_found_in_their_order_of_registration():
    found = match(Mixture(), Config([], target_parameters=["down", "experts.gate_up"]))
    assert [(t.path, t.parameter) for t in found.targets] == [("experts", "gate_up"), ("experts", "down")]
    assert found.parameter_names == ["experts.gate_up", "experts.down"]
    assert names(Mixture(), target_modules=["router"], target_parameters=["down"]) == [
        "router",
        "experts.down",
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_modules": [], "target_parameters": ["own"]}, "directly on the model"),
        ({"target_modules": [], "target_parameters": ["scale"]}, "1 dimension"),
        ({"target_modules": ["router"], "target_parameters": ["router.weight"]}, "Choose one"),
    ],
)
def test_parameters_that_cannot_be_adapted_raise(fields, text):
    with pytest.raises(ValueError, match=text):
        match(Mixture(), Config(**fields))


def test_each_adapter_may_adapt_other_parameters():
    model = Mixture()
    model.experts = TunerLayer(TunerLayer(model.experts, "gate_up"), "down")
    assert len(match(model, Config([], target_parameters=["gate_up", "down"]))) == 2
    assert len(match(model, Config([], target_parameters=["down"]))) == 1
    assert names(model, target_modules=["router"]) == ["router"]


# State dicts


def test_a_state_dict_decides_and_the_configuration_is_compared():
    keys = ["_orig_mod.body.layers.0.up.lora_A.weight", "body.layers.1.up.lora_B.weight", "lm_head.weight"]
    with pytest.warns(UnmatchedTargetWarning, match=r"configuration selects 'body.layers.2.up'"):
        found = match(Model(), Config(["up"]), keys)
    assert found.module_names == layers("up", count=2)
    config = Config(["up"], layers_to_transform=[0, 1])
    assert match(Model(), config, keys, strict=True).module_names == layers("up", count=2)
    assert match(Model(), Config(), keys[:1]).module_names == ["body.layers.0.up"]
    with pytest.raises(NoMatchingPeftModuleError, match=r"'body.layers.9.up'"):
        match(Model(), Config(["up"]), ["body.layers.9.up.lora_A.weight"])
    found = match(Model(), Config([], target_parameters=["layers.0.up.weight"]), keys[:1])
    assert [(t.path, t.parameter) for t in found.targets] == [("body.layers.0.up", "weight")]


# Tied weights


def test_the_embedding_speaks_for_all_tied_modules():
    model = Model(tied=True)
    with pytest.warns(UserWarning, match="ensure_weight_tying=True"):
        match(model, Config(["lm_head", "up"]))
    found = match(model, Config(["lm_head", "up"], ensure_weight_tying=True))
    assert found.module_names == ["embed_tokens", *layers("up"), "lm_head"]
    assert (found.embedding, found.tied, found.target_modules_to_tie) == (
        "embed_tokens",
        ["lm_head"],
        ["lm_head"],
    )
    assert found.target_modules == {"embed_tokens", "up"}
    found = match(model, Config(r".*lm_head|.*up", ensure_weight_tying=True))
    assert found.target_modules == r"(?:.*lm_head|.*up|^embed_tokens$)"


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_trained_copy_of_a_tied_module_is_one_of_the_embedding(saved):
    found = match(Model(tied=True), Config(["up"], modules_to_save=saved, ensure_weight_tying=True))
    assert found.modules_to_save == ["embed_tokens"]
    assert found.modules_to_tie == ["lm_head"]


@pytest.mark.parametrize(("tied", "text"), [(True, "none of the tied modules"), (False, "no modules")])
def test_tying_that_has_nothing_to_tie_warns(tied, text):
    with pytest.warns(UserWarning, match=text):
        match(Model(tied=tied), Config(["up"], ensure_weight_tying=True))


def test_ties_are_found_by_storage():
    model = nn.Module()
    model.embed_tokens, model.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    model.out.weight = nn.Parameter(model.embed_tokens.weight.data)
    with pytest.warns(UserWarning, match="shared by"):
        assert match(model, Config(["out"])).tied == ["out"]


# Patterns and settings


@pytest.mark.parametrize(
    ("key", "name", "found"),
    [
        ("q", "a.q", True),
        ("q", "q", True),
        ("q", "a.xq", False),
        ("a.q", "b.a.q", True),
        ("^a", "a", True),
        ("^a", "b.a", False),
        (r".*\.0\..*q", "layers.0.x.q", True),
        ("q|k", "a.k", True),
        ("layers.0", "layers.0.q", False),
        ("q.proj", "a.q_proj", True),
        ("0.q.", "layers.0.qk", True),
        ("0.q.", "layers.10.qk", False),
        (".q", "a.q", False),
        ("q.", "a.q", False),
    ],
)
def test_a_key_must_match_the_name_or_what_follows_a_dot(key, name, found):
    assert pattern_value({key: 1}, name, 0) == found
    assert Table([key], "pattern").matches(name) == ([key] if found else [])


def test_the_first_key_wins():
    assert pattern_value({"q.*": 1, "q_proj": 2}, "a.q_proj", 0) == 1
    assert pattern_value({"q_proj": 2, "q.*": 1}, "a.q_proj", 0) == 2
    assert pattern_value(None, "a", 5) == pattern_value({}, "a", 5) == 5


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)})


@pytest.mark.parametrize(
    ("tables", "rank", "alpha", "unused"),
    [
        ({"rank_pattern": {"attn": 3}, "alpha_pattern": {"at+n": 5}}, 3, 5, []),
        ({"rank_pattern": {"out_proj": 3}, "alpha_pattern": {".*out_proj": 5}}, 2, 4, ["'out_proj'", "'.*out_proj'"]),
        ({"rank_pattern": {"attn": 3, "attn.base_layer.out_proj": 1}}, 1, 4, []),
        ({"module_config": {"attn": {"r": 3, "lora_alpha": 5}, ".*out_proj": {"r": 1}}}, 1, 5, []),
    ],
)
def test_the_out_projection_has_the_settings_of_its_attention(tables, rank, alpha, unused):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnmatchedTargetWarning)
        model = get_peft_model(attention(), LoraConfig(r=2, lora_alpha=4, target_modules=["attn"], **tables))
    out = model.base_model.model.attn.base_layer.out_proj
    assert (out.r["default"], out.lora_alpha["default"], out.lora_A["default"].weight.shape) == (rank, alpha, (rank, 8))
    told = [str(w.message) for w in caught]
    assert len(told) == len(unused) and all(key in text for key, text in zip(unused, told, strict=True))


def test_a_conversion_names_an_out_projection_of_another_rank():
    config = LoraConfig(r=2, target_modules=["attn"], rank_pattern={"attn": 3}, init_lora_weights=False)
    model, x = get_peft_model(attention(), config).eval(), torch.randn(2, 3, 8)
    with torch.no_grad():
        model.base_model.model.attn.base_layer.out_proj.lora_A["default"].weight[1:] = 0
    with pytest.warns(UserWarning, match="is a LoRA already"):
        new, state = convert_to_lora(model, 0.99999)
    again = get_peft_model(attention(), new).eval()
    set_peft_model_state_dict(again, state)
    answers = [m.base_model.model.attn(x, x, x)[0] for m in (model, again)]
    assert again.base_model.model.attn.base_layer.out_proj.r == {"default": 1}
    torch.testing.assert_close(*answers)


def test_settings_without_patterns_are_the_configuration_itself():
    config = Config()
    assert settings(config, "a.b") is config


def test_settings_resolve_all_patterns_and_are_kept():
    config = Config(
        rank_pattern={"q": 2},
        alpha_pattern={"k|q": 3},
        module_config={"q": {"use_dora": True, "r": 5}, "a.*": {"r": 6}},
    )
    q = settings(config, "a.q")
    assert (q.r, q.lora_alpha, q.use_dora) == (6, 3, True)
    assert settings(config, "a.q") is q
    assert settings(config, "a.b.q") is not config
    assert settings(config, "z") is config
    assert settings(q, "a.q") is q
    config.rank_pattern["z"] = 4
    assert settings(config, "z").r == 4
    config.lora_dropout = 0.5
    assert settings(config, "a.q").lora_dropout == 0.5


def test_modules_with_equal_settings_share_them():
    config = Config(rank_pattern={"q": 2})
    assert settings(config, "0.q") is settings(config, "1.q")


def test_an_unknown_field_in_module_config_is_named():
    with pytest.raises(ValueError, match=r"lora_droput.*Did you mean 'lora_dropout'"):
        settings(Config(module_config={"q": {"lora_droput": 0.1}}), "q")


# What is stored


def test_long_lists_are_stored_as_the_shortest_suffixes():
    found = match(Model(8), Config("all-linear"))
    assert found.target_modules == {"q_proj", "k_proj", "v_proj", "up", "down"}
    some = layers("attn.q_proj", count=30)
    stored = match(Model(31), Config(some)).target_modules
    assert names(Model(31), target_modules=stored) == some
    assert match(Model(), Config(["up"])).target_modules == {"up"}


def test_a_shortened_list_never_selects_another_module():
    everything = [f"{a}.{b}" for a in "abcdefgh" for b in "xyz"]
    wanted = {name for name in everything if name != "b.x"}
    short = compact(wanted, everything, Config())
    selector = Selector(short, "target_modules")
    assert {name for name in everything if selector.find(name)} == wanted


def test_suffixes_follow_the_dots():
    assert list(suffixes("a.b.c")) == ["a.b.c", "b.c", "c"]
    assert list(suffixes("")) == [""]


# The printed plan


def test_the_plan_counts_what_will_be_trained():
    model = Model(2)
    config = Config(["q_proj"], modules_to_save=["lm_head"], rank_pattern={"0.attn.q_proj": 4}, bias="all")
    found = plan(model, config)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert found.trainable == (4 + 8) * 8 + 40 + biases
    base = sum(p.numel() for p in model.parameters())
    total = base + (4 + 8) * 8 + 40
    assert f"trainable {found.trainable:,} of {total:,} parameters" in str(found)
    lines = str(found).splitlines()
    assert lines[0].split() == ["path", "type", "shape", "rank", "trainable", "reason"]
    assert lines[2].split() == ["body.layers.0.attn.q_proj", "Linear", "4", "x", "4", "4", "32", "'q_proj'"]


AUTO = {
    "lora": lambda: peft.LoraConfig(
        r=4, lora_alpha="auto", rank_pattern={r".*0\..*v_proj": 2, r".*1\..*": 16}, alpha_pattern={"v_proj": 7}
    ),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha="auto", use_rslora=True, rank_pattern={"q_proj": 16}),
    "modules": lambda: peft.LoraConfig(
        r=4, lora_alpha="auto", module_config={"q_proj": {"r": 2}, "v_proj": {"r": 8, "lora_alpha": 3}}
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha="auto", rank_pattern={"q_proj": 2}),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha="auto"),
    "gralora": lambda: peft.GraloraConfig(r=4, hybrid_r=2, alpha="auto"),
    "randlora": lambda: peft.RandLoraConfig(r=4, randlora_alpha="auto"),
    "default": lambda: peft.LoraConfig(r=4, alpha_pattern={"q_proj": 2}),
}


@pytest.mark.parametrize("name", AUTO)
def test_the_plan_shows_the_alpha_and_scaling_that_layers_have(name):
    model, config = Model(2), AUTO[name]()
    config.target_modules = {"q_proj", "v_proj"}
    found = plan(model, config)
    adapted = peft.get_peft_model(model, config).base_model.model
    layers = [adapted.get_submodule(row.path) for row in found.rows]
    assert [row.scaling for row in found.rows] == [layer.scaling["default"] for layer in layers]
    assert [row.rank for row in found.rows] == [layer.r["default"] for layer in layers]
    assert not found.notes


@pytest.mark.parametrize(
    ("config", "scalings"),
    [
        (lambda: peft.LoraConfig(r=64, lora_alpha="auto", rank_pattern={"q_proj": 4}), {2.0}),
        (lambda: peft.LoraConfig(r=64, lora_alpha="auto", use_rslora=True, rank_pattern={"q_proj": 4}), {2.0, 8.0}),
        (lambda: peft.AdaLoraConfig(init_r=24, lora_alpha="auto", total_step=9), {2.0}),
        (lambda: peft.LoKrConfig(r=64, alpha="auto"), {1.0}),
    ],
)
def test_an_automatic_alpha_follows_the_rank_and_is_a_number_in_files(config, scalings, tmp_path):
    config = config()
    config.target_modules = {"q_proj", "v_proj"}
    assert {row.scaling for row in plan(Model(1), config).rows} == scalings
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(written.get("lora_alpha", written.get("alpha")), int)
    assert peft.PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.LoraConfig(r=64), r"lora_alpha is 8, .* 2 of 2 targets .* 64 .* scaled by 0.125, not 1.*'auto'.* 128"),
        (peft.LoraConfig(rank_pattern={"q_proj": 32}), r"1 of 2 targets .* scaled by 0.25"),
        (peft.LoHaConfig(r=16), r"alpha is 8, .* scaled by 0.5, not 1.*is 16"),
        (peft.LoraConfig(r=64, lora_alpha=16), None),
        (peft.LoraConfig(r=64, use_rslora=True), None),
        (peft.LoraConfig(r=4), None),
        (peft.VeraConfig(r=512), None),
    ],
)
def test_the_plan_notes_an_alpha_that_did_not_follow_the_rank(config, said):
    config.target_modules = {"q_proj", "v_proj"}
    found = plan(Model(1), config)
    assert bool(found.notes) == bool(said)
    assert not said or re.search(f"note: {said}" if said.startswith("alpha") else said, str(found))


@pytest.mark.parametrize("value", ["automatic", "", None])
def test_another_word_is_no_alpha(value):
    with pytest.raises(TypeError, match=r"lora_alpha.*must be a number"):
        peft.LoraConfig(lora_alpha=value)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.BertConfig()
        self.embed_tokens, self.q_proj = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.lm_head, self.score = nn.Linear(4, 6, bias=False), nn.Linear(4, 2)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


@pytest.mark.parametrize(
    "config",
    [
        peft.UniLoraConfig(r=2),
        peft.TinyLoraConfig(r=2),
        peft.VBLoRAConfig(vector_length=4, num_vectors=5, topk=1),
        peft.VeraConfig(r=3),
        peft.RandLoraConfig(r=2),
        peft.HiraConfig(r=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_the_plan_counts_what_targets_share(config):
    config.target_modules, before = {"q_proj", "k_proj"}, torch.get_rng_state()
    sizes = nn.ModuleDict({"q_proj": nn.Linear(8, 4), "k_proj": nn.Linear(8, 4)})
    state = torch.get_rng_state()
    found = plan(sizes, config)
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(before, state)
    assert found.trainable == peft.get_peft_model(sizes, config).get_nb_trainable_parameters()[0] > 0


@pytest.mark.filterwarnings("ignore:The weight of:UserWarning", "ignore:.*ensure_weight_tying.*:UserWarning")
@pytest.mark.parametrize(
    "fields",
    [
        {"task_type": "SEQ_CLS"},
        {"task_type": "SEQ_CLS", "bias": "all"},
        {"task_type": "TOKEN_CLS", "modules_to_save": ["lm_head"]},
        {"init_lora_weights": "mica", "r": 2},
        {"init_lora_weights": "mica", "r": 2, "use_dora": True},
        {"target_modules": ["lm_head"], "ensure_weight_tying": True, "rank_pattern": {"embed_tokens": 3}},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
    ],
)
def test_the_plan_counts_what_is_trained_with_heads_ties_and_fixed_factors(fields):
    config = LoraConfig(**{"target_modules": ["q_proj"], **fields})
    found = plan(Classifier(), config)
    model = peft.get_peft_model(Classifier(), config)
    assert found.trainable == model.get_nb_trainable_parameters()[0]


def test_the_plan_counts_parameters_tokens_and_attention():
    found = plan(Mixture(), Config([], target_parameters=["gate_up"]))
    assert found.trainable == 2 * 8 * (4 + 8)
    config = Config(["q_proj"], trainable_token_indices=[1, 2])
    assert plan(Model(1), config).trainable == 8 * 8 + 2 * 4
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, device="meta")})
    found = plan(attention, Config(["attn", "out_proj"]))
    assert found.trainable == 8 * (4 + 12) + 8 * (4 + 4)
    assert found.skipped == [("attn.out_proj", "part of the target 'attn'")]


def test_methods_without_targets_have_no_plan():
    with pytest.raises(ValueError, match="adapts no modules"):
        plan(Model(), SimpleNamespace(is_prompt_learning=True))


# Replication


def test_replicated_layers_share_their_parameters_and_can_be_undone():
    model = Model(3)
    model.model = nn.Module()
    model.model.layers = model.body.layers
    model.config = SimpleNamespace(num_hidden_layers=3)
    for i, layer in enumerate(model.model.layers):
        layer.attn.layer_idx = i
    before = model.model.layers
    undo = replicate(model, [[0, 2], [1, 3]])
    new = model.model.layers
    assert [layer.attn.layer_idx for layer in new] == [0, 1, 2, 3]
    assert new[1] is not new[2]
    assert new[1].up.weight is new[2].up.weight is before[1].up.weight
    assert model.config.num_hidden_layers == 4
    undo()
    assert model.model.layers is before
    assert model.config.num_hidden_layers == 3
    assert [layer.attn.layer_idx for layer in before] == [0, 1, 2]


@pytest.mark.parametrize(
    ("model", "ranges", "text"),
    [
        (nn.Linear(2, 2), [[0, 1]], "needs a list of layers"),
        (nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}), [[0, 2]], "number of layers"),
        (nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2)])}), [[1, 1]], "number of layers"),
    ],
)
def test_replication_refuses_what_it_cannot_do(model, ranges, text):
    with pytest.raises(ValueError, match=text):
        replicate(model, ranges)


# Real models, and speed


def llama(layers: int, hidden: int, inner: int, vocab: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=32,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def test_a_transformers_model_has_defaults_and_keeps_its_head():
    model = llama(2, 8, 16, 32)
    assert names(model) == [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]
    found = match(model, Config("all-linear"))
    assert len(found) == 14
    assert found.skipped == [("lm_head", "output head")]


def test_the_plan_of_a_large_model_has_the_known_counts():
    model = llama(32, 4096, 11008, 32000)
    start = time.perf_counter()
    text = str(plan(model, Config(["q_proj", "v_proj"])))
    assert time.perf_counter() - start < 1
    assert text.endswith("trainable 4,194,304 of 6,742,609,920 parameters (0.0622 %)")


def test_matching_is_linear_in_the_number_of_modules():
    def seconds(count: int) -> float:
        model = nn.Module()
        shared = nn.Linear(1, 1, device="meta")
        for i in range(count):
            model._modules[f"l{i}"] = holder = nn.Module()
            holder._modules["q"] = layer = nn.Linear.__new__(nn.Linear)
            layer.__dict__.update(shared.__dict__)
        best = 9.0
        for _ in range(3):
            start = time.perf_counter()
            assert len(match(model, Config([f"l{i}.q" for i in range(count)], rank_pattern={"l1.q": 2}))) == count
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(8000) < 10 * seconds(2000)


@pytest.mark.parametrize("layers", [range(1, 3), {2, 1}, (1, 2), torch.tensor([1, 2])])
def test_any_collection_of_layers_is_saved_as_a_list(layers, tmp_path):
    for kind in (LoraConfig, peft.LoHaConfig):
        config = kind(target_modules=["q_proj"], layers_to_transform=layers)
        config.save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path).layers_to_transform == [1, 2]


@pytest.mark.parametrize("layers", [[["a"]], "1", {"1": 2}, True, [1.5]])
def test_layers_that_are_no_numbers_are_refused(layers):
    with pytest.raises(TypeError, match=r"`layers_to_transform` must be the number of a layer or a list"):
        LoraConfig(target_modules=["q_proj"], layers_to_transform=layers)


def test_all_linear_of_ia3_loads_again(tmp_path):
    def base():
        return nn.ModuleDict(
            {"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})])}
        )

    config = peft.IA3Config(target_modules="all-linear", feedforward_modules=["down"])
    get_peft_model(base(), config).save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    shapes = {n.split(".")[-3]: tuple(p.shape) for n, p in again.named_parameters() if "ia3_l" in n}
    assert shapes == {"up": (4, 1), "down": (1, 4)}
    with pytest.raises(ValueError, match=r"\['gate'\] are no targets"):
        peft.IA3Config(target_modules=["layers.0.down"], feedforward_modules=["gate"])


def test_a_file_cannot_ask_for_layers_without_end():
    with pytest.raises(ValueError, match=r"layer_replication=\[\(0, 2\).* makes more than 16 layers of each"):
        order_of([(0, 2)] * 100_000, 2)
    assert len(order_of([(0, 2)] * 16, 2)) == 32


def test_a_target_of_a_million_letters_is_told_in_no_time():
    start = time.process_time()
    with pytest.raises(NoMatchingPeftModuleError, match="not found in the base model"):
        plan(nn.Sequential(*(nn.Linear(2, 2) for _ in range(200))), LoraConfig(target_modules=["x" * 1_000_000]))
    assert time.process_time() - start < 1


def vlm():
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**tower, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(**tower, vocab_size=32)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))


@pytest.mark.parametrize(
    ("scope", "within"),
    [
        ("text", r"model\.language_model\."),
        ("vision", r"model\.vision_tower\."),
        (["text", "vision"], r"model\.(language_model|vision_tower)\."),
    ],
)
def test_a_scope_keeps_to_parts_of_a_model(scope, within, tmp_path):
    every = [t.name for t in plan(vlm(), LoraConfig(target_modules="all-linear")).targets]
    for kind in (LoraConfig, peft.LoHaConfig):
        config = kind(target_modules="all-linear", scope=scope)
        found = [t.name for t in plan(vlm(), config).targets]
        assert found == [name for name in every if re.match(within, name)] and 0 < len(found) < len(every)
        model = get_peft_model(vlm(), config)
        assert {n.partition(".base_layer")[0] for n, _ in model.named_modules() if n.endswith("base_layer")} == {
            f"base_model.model.{name}" for name in found
        }
    config = LoraConfig(target_modules=["q_proj"], scope=scope)
    get_peft_model(vlm(), config).save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(vlm(), tmp_path)
    assert again.peft_config["default"].scope == scope
    assert all(re.match(within, n[len("base_model.model.") :]) for n, _ in again.named_parameters() if "lora_" in n)


def test_a_scope_of_experts_and_of_models_of_one_part():
    moe = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            vocab_size=32,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [t.name for t in plan(moe, LoraConfig(target_modules="all-linear", scope="experts")).targets]
    assert found == [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    both = [str(plan(moe, LoraConfig(target_modules="all-linear", scope=s))) for s in ("text", None)]
    assert both[0] == both[1]


def test_a_scope_that_is_no_part_is_refused():
    with pytest.raises(ValueError, match=r"scope='tekst' is unknown. Did you mean 'text'\?"):
        LoraConfig(target_modules="all-linear", scope="tekst")
    with pytest.raises(ValueError, match=r"scope='audio' names no part of LlavaFor.*tell these: 'text', 'vision'"):
        get_peft_model(vlm(), LoraConfig(target_modules="all-linear", scope=["text", "audio"]))
    with pytest.raises(ValueError, match=r"scope='text' names no part of Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules="all-linear", scope="text"))
    with pytest.raises(NoMatchingPeftModuleError, match=r"lie outside scope='vision'.*embed_tokens.*Exclude fewer"):
        get_peft_model(vlm(), LoraConfig(target_modules=["embed_tokens"], scope="vision"))
