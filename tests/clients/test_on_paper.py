"""What programs touch that are not installed here: their reads and patches are written out, as they are done there.

| program | touchpoint | test |
|---|---|---|
| vLLM | fields of adapter_config.json, also at defaults; names; fused experts | test_vllm... |
| llama.cpp | `lora_alpha`; A is (r, in), B is (out, r); no other tensor | test_llama_cpp... |
| mergekit | `from_pretrained(revision=).merge_and_unload()`; adapters written by hand | test_mergekit... |
| DeepSpeed | trainable parameters alone in `state_dict(exclude_frozen_parameters)` | test_deepspeed... |
| axolotl | names; patched `_create_and_replace`, `_inject_parameters`; truth of ModuleDicts | test_axolotl... |
| LLaMA-Factory | names of files; PiSSA taken back and reloaded; keywords | test_llama_factory... |
| unsloth | reads of its kernels; DoRA's module; `bnb.Linear4bit.forward`; optional names | test_unsloth... |
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")

import peft
from peft import ChangedConfigWarning, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .tiny import TARGETS, llama, logits, moved, tensors

LINEAR = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS}


def saved(folder: Path, **fields: Any) -> tuple[PeftModel, dict[str, Any], dict[str, torch.Tensor]]:
    """A model with an adapter, its configuration as JSON and the tensors of its file."""
    model = moved(get_peft_model(llama(), LoraConfig(**{**LINEAR, **fields}, task_type="CAUSAL_LM")))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model, json.loads((folder / "adapter_config.json").read_text()), tensors(folder)


def test_vllm_reads_a_configuration_with_all_its_fields(tmp_path):
    _, told, state = saved(tmp_path)
    assert (told["r"], told["lora_alpha"]) == (2, 6)
    assert sorted(told["target_modules"]) == sorted(TARGETS)
    assert (told["bias"], told["modules_to_save"], told["use_rslora"], told["use_dora"]) == ("none", None, False, False)
    for name in state:
        assert name.startswith("base_model.model.") and name.endswith(("lora_A.weight", "lora_B.weight"))
    _, told, state = saved(tmp_path / "text", target_modules="all-linear")
    assert isinstance(told["target_modules"], list | str)
    _, _, state = saved(tmp_path / "words", target_modules=["embed_tokens"])
    assert {name.rsplit(".", 1)[1] for name in state} == {"lora_embedding_A", "lora_embedding_B"}


def test_vllm_tells_the_two_fused_experts_apart(tmp_path):
    from .recipes import mixtral

    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(mixtral(), LoraConfig(r=2, target_modules=[], target_parameters=names))
    model.save_pretrained(tmp_path)
    shapes = {
        name.split(".layers.0.")[1]: tuple(t.shape) for name, t in tensors(tmp_path).items() if ".layers.0." in name
    }
    sizes = {name: p.shape for name, p in mixtral().model.layers[0].mlp.experts.named_parameters()}
    for prefix, own in (("experts.base_layer.", "gate_up_proj"), ("experts.", "down_proj")):
        count, out, inp = sizes[own]
        a, b = (next(s for n, s in shapes.items() if n.endswith(f"{prefix}lora_{x}.weight")) for x in "AB")
        assert a == (count * 2, inp) and b == (out, count * 2)


@pytest.mark.parametrize("targets", [TARGETS, ["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_llama_cpp_finds_factors_and_nothing_else(targets, tmp_path):
    model, told, state = saved(tmp_path, target_modules=targets)
    assert told["lora_alpha"] == 6 and "base_model_name_or_path" in told
    shapes = {name: m.weight.shape for name, m in llama().named_modules() if hasattr(m, "weight")}
    for name, tensor in state.items():
        plain, _, part = name.replace("base_model.model.", "").rpartition(".lora_")
        out, inp = shapes[plain]
        assert part in ("A.weight", "B.weight", "embedding_A", "embedding_B")
        if part.startswith("embedding"):
            out, inp = inp, out
        assert tensor.shape == ((2, inp) if "A" in part else (out, 2)), name
    assert {name.rpartition(".lora_")[0] for name in state} == {
        f"base_model.model.{name}" for name in shapes if name.rpartition(".")[2] in targets
    }
    assert model.peft_config["default"].r == 2


def test_mergekit_merges_and_saves(tmp_path):
    model, _, _ = saved(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(llama(), tmp_path / "adapter", revision="main", is_trainable=False)
    plain = merged.merge_and_unload()
    plain.save_pretrained(tmp_path / "merged")
    again = type(llama()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [True, False])
def test_mergekit_s_adapters_written_by_hand_load(words, tmp_path):
    base, expected, state = llama(), llama(), {}
    ranks = {"q_proj": 3, "v_proj": 2, **({"embed_tokens": 2} if words else {})}
    with torch.no_grad():
        state["base_model.model.lm_head.weight"] = base.lm_head.weight + 1
        expected.lm_head.weight += 1
        for name, module in base.named_modules():
            r = ranks.get(name.rpartition(".")[2])
            if r is None:
                continue
            out, inp = reversed(module.weight.shape) if name.endswith("embed_tokens") else module.weight.shape
            ends = ("embedding_A", "embedding_B") if name.endswith("embed_tokens") else ("A.weight", "B.weight")
            a, b = torch.randn(r, inp), torch.randn(out, r)
            state |= {f"base_model.model.{name}.lora_{end}": t for end, t in zip(ends, (a, b), strict=True)}
            expected.get_submodule(name).weight += (b @ a).T if name.endswith("embed_tokens") else b @ a
            if not words:
                state[f"base_model.model.{name}.lora_B.bias"] = torch.randn(out)
                bias = state[f"base_model.model.{name}.lora_B.bias"].clone()
                expected.get_submodule(name).bias = torch.nn.Parameter(bias)
    told = {
        "base_model_name_or_path": "base",
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"q_proj": 3},
        "target_modules": list(ranks),
        "modules_to_save": ["lm_head"],
        "lora_bias": not words,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    save_file({k: v.detach().contiguous() for k, v in state.items()}, tmp_path / "adapter_model.safetensors")
    found = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-3, atol=1e-4)


def test_deepspeed_saves_and_gathers_trainable_parameters_alone():
    model = get_peft_model(llama(), LoraConfig(**LINEAR, modules_to_save=["lm_head"]))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    kept = {name: t for name, t in model.state_dict().items() if name not in frozen}  # exclude_frozen_parameters
    whole = get_peft_model_state_dict(model)
    found = get_peft_model_state_dict(model, state_dict=kept)
    assert found.keys() == whole.keys() and all(torch.equal(found[k], whole[k]) for k in whole)
    missing, unexpected = model.load_state_dict(kept, strict=False)  # load_module_strict=False
    assert not unexpected and set(missing) <= frozen


def test_axolotl_finds_its_names():
    from peft.optimizers import create_loraplus_optimizer
    from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper, _LoraParameterProxy
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import onload_layer
    from peft.utils import transpose
    from peft.utils.other import _get_submodules, get_pattern_key
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )

    assert get_pattern_key(["q_proj", "layers.0.v_proj"], "model.layers.0.v_proj") == "layers.0.v_proj"
    parent, target, name = _get_submodules(llama(), "model.layers.0.self_attn.q_proj")
    assert name == "q_proj" and getattr(parent, name) is target
    assert torch.equal(transpose(torch.ones(2, 3), True), torch.ones(3, 2))
    assert issubclass(Linear, LoraLayer) and issubclass(LoraModel, BaseTuner)
    assert all(
        callable(f)
        for f in (create_loraplus_optimizer, convert_peft_config_for_transformers, get_model_conversion_mapping)
    )
    assert isinstance(ParamWrapper, type) and isinstance(_LoraParameterProxy, type)
    model = get_peft_model(llama(), LoraConfig(**LINEAR))
    with onload_layer(model.base_model.model.model.layers[0].self_attn.q_proj):
        pass
    assert model.model.peft_config["default"] is model.peft_config["default"]
    source = inspect.getsource(peft.utils.other.prepare_model_for_kbit_training)
    assert source.startswith("def prepare_model_for_kbit_training(")


def test_axolotl_s_patches_are_called(monkeypatch):
    from peft.tuners.lora.model import LoraModel

    from .recipes import mixtral

    seen: list[Any] = []
    original, parameters = LoraModel._create_and_replace, BaseTuner._inject_parameters

    def create(self, peft_config, adapter_name, target, target_name, parent, current_key, *args, **kwargs):
        assert getattr(parent, target_name) is target and peft_config.r == 2
        seen.append((adapter_name, current_key, target_name, *kwargs.values()))
        return original(self, peft_config, adapter_name, target, target_name, parent, current_key, *args, **kwargs)

    def inject(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        seen.append("parameters")
        return parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage)

    monkeypatch.setattr(LoraModel, "_create_and_replace", create)
    monkeypatch.setattr(BaseTuner, "_inject_parameters", inject)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=names)
    model = get_peft_model(mixtral(), config, "one")
    layers = [f"model.layers.{n}" for n in (0, 1)]
    modules = [("one", f"{at}.self_attn.{name}", name) for at in layers for name in ("q_proj", "v_proj")]
    experts = [("one", f"{at}.{name}", "experts", name.rpartition(".")[2]) for at in layers for name in names]
    assert "parameters" in seen and seen.index("parameters") < seen.index(experts[0])
    assert [s for s in seen if s in modules] == modules
    assert [s for s in seen if s in experts] == experts
    assert {*seen} == {*modules, *experts, "parameters"}
    assert set(model.base_model.targeted_module_names) == {key for _, key, _ in modules}
    del seen[:]
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    assert [s[1] for s in seen] == [f"{at}.self_attn.q_proj" for at in layers]


def test_axolotl_s_patches_may_leave_a_target_out(monkeypatch):
    from peft.tuners.lora.model import LoraModel

    original = LoraModel._create_and_replace

    def create(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if "layers.0" not in current_key:
            original(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", create)
    model = get_peft_model(llama(), LoraConfig(**LINEAR))
    adapted = {name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len(adapted) == len(TARGETS) and all("layers.1" in name for name in adapted)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens"]}])
def test_axolotl_asks_dictionaries_whether_they_hold_anything(fields):
    model = get_peft_model(llama(), LoraConfig(**{**LINEAR, **fields}))
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    words = "target_modules" in fields
    assert bool(layer.lora_A) == bool(layer.lora_B) == (not words)
    assert bool(layer.lora_embedding_A) == bool(layer.lora_embedding_B) == words
    assert bool(getattr(layer, "lora_magnitude_vector", None)) == ("use_dora" in fields)
    assert layer.active_adapters == ["default"] and layer.base_layer is layer.get_base_layer()
    for name in layer.active_adapters:
        for held in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
            assert (name in held) == bool(held)


def test_llama_factory_takes_pissa_back(tmp_path):
    assert (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) == ("adapter_model.safetensors", "adapter_model.bin")
    model = get_peft_model(llama(), LoraConfig(**LINEAR, init_lora_weights="pissa_niter_16"))
    config = model.peft_config["default"]

    def save_as_if_plain(folder: Path) -> None:
        start, config.init_lora_weights = config.init_lora_weights, True
        model.save_pretrained(folder)
        config.init_lora_weights = start

    save_as_if_plain(tmp_path / "initial")
    moved(model)
    trained = logits(model)
    save_as_if_plain(tmp_path / "backup")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    plain = PeftModel.from_pretrained(llama(), tmp_path / "converted")
    torch.testing.assert_close(logits(plain), trained, rtol=1e-3, atol=1e-4)
    assert {t.shape[0] for n, t in tensors(tmp_path / "converted").items() if "lora_A" in n} == {4}
    with pytest.warns(ChangedConfigWarning, match="keeps its own settings"):
        model.load_adapter(str(tmp_path / "backup"), "default", is_trainable=True)
    model.set_adapter("default")
    model.peft_config["default"].init_lora_weights = "pissa_niter_16"
    assert torch.equal(logits(model.eval()), trained)


def test_llama_factory_loads_with_all_its_keywords(tmp_path):
    model, _, _ = saved(tmp_path / "sub")
    where = {"subfolder": "sub", "cache_dir": str(tmp_path), "revision": "main", "token": None}
    again = PeftModel.from_pretrained(llama(), str(tmp_path), is_trainable=True, offload_folder="offload", **where)
    assert torch.equal(logits(again.eval()), logits(model))
    assert any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_unsloth_s_kernels_compute_the_same_from_what_they_read(dora):
    model = moved(get_peft_model(llama(), LoraConfig(**LINEAR, use_dora=dora)))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 16)
    assert layer.disable_adapters is False and layer.merged is False
    name = layer.active_adapters[0]
    weight, a, b = layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    scale = layer.scaling[name]
    assert type(scale) is float and isinstance(layer.lora_dropout[name], torch.nn.Identity)
    with torch.no_grad():
        if dora:
            part = layer.lora_magnitude_vector[name]
            kwargs = {"lora_A": layer.lora_A[name], "lora_B": layer.lora_B[name], "scaling": scale}
            found = layer.base_layer(x) + part(x, **kwargs, base_layer=layer.base_layer)
        else:
            found = x @ (weight + scale * (b @ a)).T
        torch.testing.assert_close(layer(x), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("base", "x"),
    [
        (torch.nn.Linear(4, 6), torch.randn(2, 4)),
        (torch.nn.Conv2d(4, 6, 3, stride=2), torch.randn(2, 4, 7, 7)),
        (torch.nn.Conv1d(4, 6, 3, padding=1, bias=False), torch.randn(2, 4, 7)),
    ],
    ids=["linear", "conv-2d", "conv-1d"],
)
def test_unsloth_may_call_dora_s_module_of_any_layer(base, x, given):
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = moved(get_peft_model(torch.nn.Sequential(base), config), size=0.5)
    layer = model.base_model.model[0]
    parts = {"lora_A": layer.lora_A["default"], "lora_B": layer.lora_B["default"]}
    if given:
        parts["base_result"] = layer.base_layer(x)
    part = layer.lora_magnitude_vector["default"]
    added = part(x, **parts, scaling=layer.scaling["default"], base_layer=layer.base_layer)
    torch.testing.assert_close(layer.base_layer(x) + added, layer(x), rtol=1e-4, atol=1e-5)
    own = torch.autograd.grad(added.square().sum(), part.weight, retain_graph=True)[0]
    expected = torch.autograd.grad((layer(x) - layer.base_layer(x)).square().sum(), part.weight)[0]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_unsloth_s_optional_names():
    from peft.import_utils import is_torchao_available
    from peft.utils.save_and_load import _maybe_shard_state_dict_for_tp

    assert is_torchao_available() in (True, False)
    assert "def _maybe_shard_state_dict_for_tp(" in inspect.getsource(_maybe_shard_state_dict_for_tp)
