"""Experts that transformers 5 holds as stacked parameters: targets named as the modules they used to be."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import peft
from peft import LoraConfig, NoMatchingPeftModuleError, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.errors import UnmatchedTargetWarning
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

transformers = pytest.importorskip("transformers", "5.0")

IDS = torch.tensor([[3, 4, 5, 6]])
SIZES = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
BOTH, DOWN = r".*\.gate_up_proj", "experts.down_proj"


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


def qwen3(**changes: Any) -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=4, **changes)
    ).eval()


def qwen2() -> Any:
    config = transformers.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=12)
    return transformers.Qwen2MoeForCausalLM(config).eval()


def gpt_oss() -> Any:
    sizes = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return model


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": False, **changes})


def shapes(model: Any, part: str) -> dict[str, tuple[int, ...]]:
    return {k.partition(part)[2]: tuple(v.shape) for k, v in get_peft_model_state_dict(model).items() if part in k}


ALL = {
    ".base_layer.lora_A.weight": (12, 8), ".base_layer.lora_B.weight": (24, 12),
    ".lora_A.weight": (6, 12), ".lora_B.weight": (8, 6),
}  # fmt: skip
ROWS = [
    (mixtral, ["w1", "w2", "w3"], ["gate_up_proj", "down_proj"], set()),
    (mixtral, ["q_proj", "w1", "w2", "w3"], ["gate_up_proj", "down_proj"], {"q_proj"}),
    (mixtral, ["experts.0.w1", "experts.0.w3", "w2"], ["gate_up_proj", "down_proj"], set()),
    (mixtral, r".*\.(w1|w2|w3)", ["gate_up_proj", "down_proj"], set()),
    (mixtral, r".*block_sparse_moe.experts.*\.(w1|w2|w3)", ["gate_up_proj", "down_proj"], set()),
    (qwen3, ["gate_proj", "up_proj", "down_proj"], ["gate_up_proj", "down_proj"], set()),
    (qwen3, ["gate_proj", "up_proj", "down_proj", "gate"], ["gate_up_proj", "down_proj", "gate.weight"], set()),
]


@pytest.mark.parametrize(("make", "targets", "parameters", "modules"), ROWS)
def test_projections_of_experts_are_targeted_under_their_old_names(make, targets, parameters, modules):
    config = lora(target_modules=targets)
    planned = peft.plan(make(), lora(target_modules=targets))
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.PeftWarning)
        model = get_peft_model(make(), config)
    assert config.target_parameters == parameters
    assert set(config.target_modules) == modules
    assert (config.rank_pattern, config.alpha_pattern) == ({BOTH: 4}, {BOTH: 6})
    assert shapes(model, "layers.0.mlp.experts") == ALL
    assert len(planned) == len(list(peft.core.layer.tuner_layers(model.base_model.model)))


@pytest.mark.parametrize(("make", "down"), [(mixtral, "w2"), (qwen3, "down_proj")])
def test_the_second_projection_alone_keeps_its_rank(make, down):
    model = get_peft_model(make(), lora(target_modules=[down]))
    assert shapes(model, "mlp.experts") == {".lora_A.weight": (6, 12), ".lora_B.weight": (8, 6)}
    assert not model.peft_config["default"].rank_pattern


@pytest.mark.parametrize(("make", "half", "other"), [(mixtral, "w1", "w3"), (qwen3, "up_proj", "gate_proj")])
def test_half_of_a_stacked_parameter_is_refused(make, half, other):
    config = lora(target_modules=["q_proj", half])
    with pytest.raises(ValueError, match=f"selects '{half}' of the experts, .* together with '{other}'"):
        get_peft_model(make(), config)
    assert (config.target_modules, config.target_parameters) == ({"q_proj", half}, None)


def test_a_failed_wrap_gives_back_the_configuration():
    config = lora(target_modules=["w1", "w2", "w3"], lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias=True has no meaning"):
        get_peft_model(mixtral(), config)
    assert config.target_modules == {"w1", "w2", "w3"}
    assert (config.target_parameters, config.rank_pattern, config.alpha_pattern) == (None, {}, {})


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_biases_of_experts_are_adapted(changes, implementation, tmp_path, monkeypatch):
    base = gpt_oss()
    base.set_experts_implementation(implementation)
    plain, experts = copy.deepcopy(base), "model.layers.0.mlp.experts"
    config = lora(target_modules=[], target_parameters=["gate_up_proj", "down_proj"], lora_bias=True, **changes)
    model = get_peft_model(base, config)
    layers = [model.get_submodule(f"base_model.model.{experts}{more}") for more in (".base_layer", "")]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].bias)
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(peft.core.views.chosen.Chosen, "whole", None)  # nothing asks for all numbers of W'
        wanted = model(IDS).logits
        assert not torch.allclose(wanted, plain(IDS).logits, atol=1e-2)
    model.save_pretrained(tmp_path)
    assert shapes(model, "layers.0.mlp.experts")[".base_layer.lora_B.bias"] == (3, 24)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()(IDS).logits, wanted)
    model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(IDS).logits, wanted)
    model.set_adapter("default")
    both = model(IDS.expand(2, -1), adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(both, torch.cat([wanted, plain(IDS).logits]))
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, wanted)
    b0 = plain.get_submodule(experts).gate_up_proj_bias
    update = layers[0].scaling["default"] * layers[0].lora_B["default"].bias
    torch.testing.assert_close(layers[0].get_base_layer().gate_up_proj_bias, b0 + update)
    model.unmerge_adapter()
    assert torch.equal(layers[0].get_base_layer().gate_up_proj_bias, b0)


def test_biases_of_experts_come_and_go_with_swaps():
    base, parameters = gpt_oss(), ["gate_up_proj", "down_proj"]
    model, other = (
        get_peft_model(
            copy.deepcopy(base), lora(target_modules=[], target_parameters=parameters, lora_bias=bias)
        ).eval()
        for bias in (False, True)
    )
    first, config = get_peft_model_state_dict(model), copy.deepcopy(model.peft_config["default"])
    before = model(IDS).logits
    swap = peft.utils.hotswap.hotswap_adapter_from_state_dict
    swap(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits)
    swap(model, first, "default", config)
    torch.testing.assert_close(model(IDS).logits, before)


@pytest.mark.parametrize(
    "config",
    [
        peft.BeftConfig(init_weights=False),
        peft.IA3Config(feedforward_modules=[], init_ia3_weights=False),
        peft.RoadConfig(group_size=2, init_weights=False),
        peft.GloraConfig(r=2, init_weights=False),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_methods_that_change_a_bias_change_that_of_each_expert(config):
    base = gpt_oss()
    before = {k: v.clone() for k, v in base.state_dict().items() if k.endswith("_bias")}
    config.target_modules, config.target_parameters = [], ["gate_up_proj", "down_proj"]
    model = get_peft_model(base, config).eval()
    wanted = model(IDS).logits
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(IDS).logits, wanted)
    after = plain.state_dict()
    assert all(not torch.equal(after[k], v) for k, v in before.items()) and len(before) == 4


@pytest.mark.parametrize("make", [mixtral, qwen3])
def test_all_linear_means_the_experts_and_the_router_too(make):
    model = get_peft_model(make(), lora(target_modules="all-linear"))
    assert shapes(model, "layers.1.mlp.experts") == ALL
    assert shapes(model, "layers.1.mlp.gate") == {".lora_A.weight": (2, 8), ".lora_B.weight": (3, 2)}
    assert "lm_head" not in str(get_peft_model_state_dict(model).keys())


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["gate"], ["gate_up_proj", "down_proj"]),
        (r".*\.gate", ["gate_up_proj", "down_proj"]),
        (["w1", "w3"], ["down_proj", "gate.weight"]),
        (["experts"], ["gate.weight"]),
        (["experts", "gate"], None),
    ],
)
def test_excluding_an_old_or_a_new_name_leaves_it_out(exclude, left):
    model = get_peft_model(mixtral(), lora(target_modules="all-linear", exclude_modules=exclude))
    assert model.peft_config["default"].target_parameters == left


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rewriting_keeps_the_scaling(use_rslora):
    model = get_peft_model(mixtral(), lora(target_modules=["w1", "w2", "w3"], use_rslora=use_rslora))
    scalings = [layer.scaling["default"] for _, layer in peft.core.layer.tuner_layers(model)]
    assert scalings == pytest.approx([3 / 2**0.5 if use_rslora else 1.5] * 4)


def test_dense_layers_beside_the_experts_stay_targets():
    model = get_peft_model(qwen3(mlp_only_layers=[1]), lora(target_modules=["gate_proj", "up_proj", "down_proj"]))
    assert shapes(model, "layers.0.mlp.experts") == ALL
    assert set(shapes(model, "layers.1.mlp.")) == {
        f"{name}.lora_{k}.weight" for name in ("gate_proj", "up_proj", "down_proj") for k in "AB"
    }


@pytest.mark.parametrize("make", [mixtral, qwen3])
def test_what_was_rewritten_is_saved_and_loads(make, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make(), lora(target_modules="all-linear")).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", peft.PeftWarning)
            loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
        torch.testing.assert_close(loaded(IDS).logits, expected)
        assert loaded.peft_config["default"].rank_pattern == {BOTH: 4}
        torch.testing.assert_close(loaded.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def old_file(block: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A checkpoint with factors of each expert's projections, as made before the experts were stacked."""
    state = {}
    for path in [f"{block}.experts.{e}.{name}" for e in range(3) for name in names] + ["self_attn.q_proj"]:
        rows, columns = (8, 12) if path.endswith(names[2]) else (12, 8)
        rows = 8 if "q_proj" in path else rows
        for layer in range(2):
            key = f"base_model.model.model.layers.{layer}.{path}.lora_"
            state |= {f"{key}A.weight": torch.randn(2, columns), f"{key}B.weight": torch.randn(rows, 2)}
    return state


OLD = [(mixtral, "block_sparse_moe", ("w1", "w3", "w2")), (qwen3, "mlp", ("gate_proj", "up_proj", "down_proj"))]


@pytest.mark.parametrize(("make", "block", "names"), OLD)
def test_files_made_for_one_module_an_expert_load_into_the_stacked_parameters(make, block, names, tmp_path):
    state, config = old_file(block, names), lora(target_modules=["q_proj", *names])
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    base = make()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.PeftWarning)
        model = PeftModel.from_pretrained(base, tmp_path).eval()
    expected = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    for layer in range(2):
        old, path = f"base_model.model.model.layers.{layer}.{block}.experts", f"model.layers.{layer}.mlp.experts"
        update = {
            name: torch.stack([
                1.5 * state[f"{old}.{e}.{name}.lora_B.weight"] @ state[f"{old}.{e}.{name}.lora_A.weight"]
                for e in range(3)
            ])
            for name in names
        }  # fmt: skip
        for name, delta in (
            ("gate_up_proj", torch.cat([update[n] for n in names[:2]], 1)),
            ("down_proj", update[names[2]]),
        ):
            key = f"{path}.{name}"
            torch.testing.assert_close(merged.state_dict()[key], before[key] + delta)


@pytest.mark.parametrize("missing", ["experts.1.w3.lora_A", "experts.2.w2.lora_B", "experts.0.w1.lora_A"])
def test_a_file_that_lacks_an_experts_factor_is_told_and_not_made_up(missing):
    make, block, names = OLD[0]
    state = {k: v for k, v in old_file(block, names).items() if f"layers.0.{block}.{missing}" not in k}
    model = get_peft_model(make(), lora(target_modules=["q_proj", *names]))
    with (
        pytest.warns(peft.MissingTensorsWarning, match=r"layers.0.mlp.experts"),
        pytest.warns(peft.UnexpectedTensorsWarning, match=r"experts.0"),
    ):
        peft.set_peft_model_state_dict(model, state)


def test_experts_that_never_were_modules_are_named_with_how_to_adapt_them():
    with pytest.raises(NoMatchingPeftModuleError, match=r"target_parameters=\['experts.down_proj', 'experts.gate_up"):
        get_peft_model(mixtral(), lora(target_modules=["gate_proj"]))
    with pytest.warns(UnmatchedTargetWarning, match=r"leaves them out.*layers.0.mlp.experts.gate_up_proj.*target_para"):
        get_peft_model(qwen2(), lora(target_modules="all-linear"))
    with pytest.warns(UnmatchedTargetWarning, match="stacked parameters and no layers"):
        get_peft_model(qwen2(), lora(target_modules=["gate_proj"]))
    with pytest.warns(UnmatchedTargetWarning, match="'model.layers.0.mlp.experts.down_proj'"):
        get_peft_model(mixtral(), peft.IA3Config(target_modules="all-linear", feedforward_modules=[]))
    for changes in ({"exclude_modules": ["experts"]}, {"target_parameters": ["experts.gate_up_proj", DOWN]}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", peft.PeftWarning)
            get_peft_model(qwen2(), lora(target_modules="all-linear", **changes))


def test_layers_to_transform_says_that_it_does_not_restrict_parameters():
    config = lora(target_modules=["q_proj", "w1", "w3"], layers_to_transform=[0])
    with pytest.warns(UnmatchedTargetWarning, match=r"restricts target_modules only.*'model.layers.1.mlp.experts.gate"):
        model = get_peft_model(mixtral(), config)
    assert shapes(model, "layers.1.mlp.experts") == {".lora_A.weight": (12, 8), ".lora_B.weight": (24, 12)}
    assert not shapes(model, "layers.1.self_attn")


def test_transformers_own_loader_gets_the_same_configuration():
    config = lora(target_modules=["q_proj", "w1", "w3"])
    convert_peft_config_for_transformers(config, mixtral(), None)
    assert (config.target_modules, config.target_parameters) == ({"q_proj"}, ["gate_up_proj"])
    assert config.rank_pattern == {BOTH: 4}


class Apart(torch.nn.Module):
    """Mixtral's experts as modules of their own, as transformers 4 has them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
        for layer in self.model.layers:
            layer.mlp = torch.nn.Module()
            layer.mlp.experts = torch.nn.ModuleList([torch.nn.Module() for _ in range(3)])
            layer.self_attn = torch.nn.Module()
            layer.self_attn.q_proj = torch.nn.Linear(8, 8, bias=False)
            for expert in layer.mlp.experts:
                for name, (rows, columns) in zip(names, [(12, 8), (12, 8), (8, 12)], strict=True):
                    expert.add_module(name, torch.nn.Linear(columns, rows, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.layers[0].self_attn.q_proj(x)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},
        {"target_modules": ["w1", "w3"], "use_rslora": True},
        {"target_modules": ["w2"], "rank_pattern": {r".*layers\.1.*": 3}},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    ],
)
def test_files_made_for_stacked_parameters_load_into_one_module_an_expert(names, settings, tmp_path):
    model = get_peft_model(mixtral(), lora(**settings))
    model.save_pretrained(tmp_path)
    base = dict(model.get_base_model().named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.PeftWarning)
        warnings.simplefilter("ignore", peft.errors.OtherBaseWarning)  # the stand-in has nothing but these layers
        there = PeftModel.from_pretrained(Apart(names), tmp_path)
    before = {k.replace(".base_layer", ""): v.clone() for k, v in there.get_base_model().named_parameters()}
    stacks = {k.replace(".base_layer", ""): v.clone() for k, v in base.items() if "experts" in k and "lora" not in k}
    merged, stacked = there.merge_and_unload(), model.merge_and_unload()
    changed = 0
    for key, old in stacks.items():
        update = stacked.state_dict()[key] - old
        path, _, kind = key.rpartition(".")
        halves = dict(zip(names[:2], update.chunk(2, 1), strict=True)) if kind == "gate_up_proj" else {names[2]: update}
        for name, delta in halves.items():
            for expert in range(3):
                weight = f"{path}.{expert}.{name}.weight"
                torch.testing.assert_close(
                    merged.state_dict()[weight] - before[weight], delta[expert], rtol=1e-4, atol=1e-5
                )
                changed += bool(delta[expert].abs().max() > 0)
    assert changed


@pytest.mark.parametrize(("make", "block", "names"), OLD)
@pytest.mark.parametrize("way", ["hotswap", "pool"])
def test_files_made_for_one_module_an_expert_are_exchanged_in_place(make, block, names, way, tmp_path):
    from peft.hotswap import AdapterPool, hotswap_adapter

    lora(target_modules=["q_proj", *names]).save_pretrained(tmp_path)
    save_file(old_file(block, names), tmp_path / "adapter_model.safetensors")
    base = make()
    expected = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(IDS).logits
    model = get_peft_model(base, lora(target_modules=["q_proj", *names])).eval()
    assert not torch.allclose(model(IDS).logits, expected)
    if way == "pool":
        pool = AdapterPool(model)
        pool.register("old", tmp_path)
        pool.activate("old")
    else:
        hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(IDS).logits, expected)
