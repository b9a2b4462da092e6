"""State dictionaries, adapter files, loading and saving."""

from __future__ import annotations

import json
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    IA3Config,
    LoraConfig,
    MissingTensorsWarning,
    PeftModel,
    PeftWarning,
    UnexpectedTensorsWarning,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.core.checkpoint import walk
from peft.errors import PeftStrictError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.fc2(torch.relu(self.fc1(x)))))


def mlp():
    torch.manual_seed(0)
    return MLP().eval()


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["fc1", "fc2"], "init_lora_weights": False, **changes})


def adapted(**changes):
    return get_peft_model(mlp(), lora(**changes)).eval()


def llama(vocab=32, tie=False):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


X = torch.linspace(-1, 1, 24).view(4, 6)
KEYS = [f"base_model.model.{m}.lora_{f}.weight" for m in ("fc1", "fc2") for f in "AB"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# Keys ---------------------------------------------------------------------------------------------------


def test_keys_are_the_usual_ones_without_the_adapters_name():
    model = adapted()
    assert sorted(get_peft_model_state_dict(model)) == KEYS
    live = model.base_model.model.fc1.lora_A["default"].weight
    assert get_peft_model_state_dict(model)[KEYS[0]].data_ptr() == live.data_ptr()


def test_a_plain_model_has_keys_without_the_prefix():
    base = inject_adapter_in_model(lora(), mlp())
    assert sorted(get_peft_model_state_dict(base)) == [k.removeprefix("base_model.model.") for k in KEYS]


def test_biases_follow_the_configuration():
    names = {k for k in get_peft_model_state_dict(adapted(bias="lora_only")) if k.endswith("bias")}
    assert names == {f"base_model.model.{m}.base_layer.bias" for m in ("fc1", "fc2")}
    names = {k for k in get_peft_model_state_dict(adapted(bias="all")) if k.endswith("bias")}
    more = {f"base_model.model.{m}.bias" for m in ("head", "norm")}
    assert names == {f"base_model.model.{m}.base_layer.bias" for m in ("fc1", "fc2")} | more


def test_a_bias_of_a_copied_module_is_saved_twice_and_its_original_stays_frozen(tmp_path):
    """As the original library writes them: under the module's name, and under that of the copy."""
    model = adapted(bias="all", modules_to_save=["head"])
    head = model.base_model.model.head
    assert head.modules_to_save["default"].bias.requires_grad
    assert not head.original_module.bias.requires_grad
    with torch.no_grad():
        head.modules_to_save["default"].bias.add_(1)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    start = "base_model.model.head"
    assert torch.equal(state[f"{start}.bias"], head.modules_to_save["default"].bias)
    assert torch.equal(state[f"{start}.modules_to_save.bias"], state[f"{start}.bias"])
    assert torch.equal(state[f"{start}.original_module.bias"], head.original_module.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnexpectedTensorsWarning)
        warnings.simplefilter("error", MissingTensorsWarning)
        again = PeftModel.from_pretrained(mlp(), tmp_path)
    x = torch.randn(4, 6)
    assert torch.equal(again(x), model(x))


def test_saved_modules_have_their_original_names():
    state = get_peft_model_state_dict(adapted(modules_to_save=["head", "norm"]))
    extra = {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    extra |= {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(state) - set(KEYS) == {f"base_model.model.{n}" for n in extra}


def test_the_magnitude_of_dora_is_saved_without_weight():
    state = get_peft_model_state_dict(adapted(use_dora=True))
    assert "base_model.model.fc1.lora_magnitude_vector" in state


@pytest.mark.parametrize("name", ["foo", "foobar", "lora_A", "weight", "fc1", "default", "other", "base_layer", "a"])
def test_no_adapter_is_mistaken_for_another(name):
    names = [name, *[n for n in ("foo", "foobar", "fc1", "fc2") if n != name]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(mlp(), lora(modules_to_save=["head"]), adapter_name=names[0])
        for other in names[1:]:
            model.add_adapter(other, lora(modules_to_save=["head"]))
    before = {n: {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name=n).items()} for n in names}
    assert all(len(s) == len(KEYS) + 2 for s in before.values())
    new = {k: torch.randn_like(v) for k, v in before[name].items()}
    set_peft_model_state_dict(model, new, adapter_name=name)
    for n in names:
        assert same(get_peft_model_state_dict(model, adapter_name=n), new if n == name else before[n])


def test_hostile_module_names_make_the_round_trip():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("lora_A", "default", "weight_", "lora_head", "base_layer", "modules_to_save"):
                self.add_module(name, nn.Linear(3, 3))

        def forward(self, x):
            for child in self.children():
                x = child(x)
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(Odd(), config)
    state = get_peft_model_state_dict(model)
    assert len(state) == 12 and len(walk(model, "default")) == 12
    new = {k: torch.randn_like(v) for k, v in state.items()}
    set_peft_model_state_dict(model, new)
    assert same(get_peft_model_state_dict(model), new)


# A given state dictionary -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3), (5, 3), (6,)])
def test_tensors_of_another_shape_are_not_taken_from_a_given_state_dict(shape):
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]))
    state = {**model.state_dict(), "base_model.model.0.lora_A.default.weight": torch.ones(shape)}
    with pytest.raises(ValueError, match=r"another shape than the model's: '0.lora_A.default.weight'|lora_A.default"):
        get_peft_model_state_dict(model, state)


def test_tensors_come_from_the_given_state_dict():
    model = adapted(modules_to_save=["head"])
    full = {k: v + 1 for k, v in model.state_dict().items()}
    got = get_peft_model_state_dict(model, state_dict=full)
    live = get_peft_model_state_dict(model)
    assert got.keys() == live.keys()
    assert all(torch.equal(got[k], live[k] + 1) for k in live)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module."])
def test_names_of_wrappers_in_the_given_state_dict_are_understood(wrapper):
    model = adapted()
    full = {wrapper + k: v for k, v in model.state_dict().items()}
    assert sorted(get_peft_model_state_dict(model, state_dict=full)) == KEYS


def test_an_empty_or_partial_state_is_never_saved(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="lacks 4 of the adapter's 4 tensors"):
        model.save_pretrained(tmp_path, state_dict={})
    part = {k: v for k, v in model.state_dict().items() if "fc2" not in k}
    with pytest.raises(ValueError, match=r"fc2\.lora_A\.default\.weight"):
        model.save_pretrained(tmp_path, state_dict=part)
    shard = {k: v[:0] if "lora_A" in k else v for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="without elements"):
        model.save_pretrained(tmp_path, state_dict=shard)
    assert list(tmp_path.iterdir()) == []


def test_compiled_models_keep_or_lose_their_prefix():
    model = adapted()
    compiled = torch.compile(model)
    assert sorted(get_peft_model_state_dict(compiled, unwrap_compiled=True)) == KEYS
    assert all(k.startswith("_orig_mod.") for k in get_peft_model_state_dict(compiled))
    new = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(compiled).items()}
    set_peft_model_state_dict(compiled, new)
    assert torch.equal(get_peft_model_state_dict(model)[KEYS[0]], new["_orig_mod." + KEYS[0]])


# Loading a state ----------------------------------------------------------------------------------------


def test_loading_is_in_place_and_keeps_dtype():
    model = adapted()
    parameters = dict(model.named_parameters())
    state = {k: torch.randn_like(v).half() for k, v in get_peft_model_state_dict(model).items()}
    result = set_peft_model_state_dict(model, state)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert all(p is parameters[n] and p.dtype == torch.float32 for n, p in model.named_parameters())
    assert all(torch.equal(v, state[k].float()) for k, v in get_peft_model_state_dict(model).items())


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_keys_fit_with_and_without_the_prefix(prefixed, wrapped):
    model = adapted() if wrapped else inject_adapter_in_model(lora(), mlp())
    state = {
        k.removeprefix("base_model.model."): torch.randn_like(v)
        for k, v in get_peft_model_state_dict(adapted()).items()
    }
    given = {"base_model.model." + k: v for k, v in state.items()} if prefixed else state
    set_peft_model_state_dict(model, given)
    got = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    assert same(got, state)


def test_missing_and_unexpected_tensors_are_listed_with_the_nearest():
    model = adapted()
    state = get_peft_model_state_dict(model)
    state["base_model.model.fc3.lora_A.weight"] = state.pop("base_model.model.fc2.lora_A.weight")
    with (
        pytest.warns(MissingTensorsWarning, match=r"fc2\.lora_A\.weight.*Did you mean '.*fc3\.lora_A\.weight'"),
        pytest.warns(UnexpectedTensorsWarning, match=r"fc3\.lora_A\.weight Did you mean"),
    ):
        result = set_peft_model_state_dict(model, state)
    assert result.missing_keys == ["base_model.model.fc2.lora_A.default.weight"]
    assert result.unexpected_keys == ["base_model.model.fc3.lora_A.weight"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PeftStrictError, match="fc2"):
        set_peft_model_state_dict(model, {k: v + 1 for k, v in state.items()}, strict=True)
    assert same(model.state_dict(), before)


def test_nothing_that_fits_is_an_error():
    model = adapted()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for state in ({}, {"something.else": torch.zeros(2)}):
        with pytest.raises(ValueError, match="No tensor of the checkpoint fits"):
            set_peft_model_state_dict(model, state)
    assert same(model.state_dict(), before)


def test_wrong_shapes_change_nothing_or_are_left_out():
    model = adapted()
    state = {k: v + 1 for k, v in get_peft_model_state_dict(model).items()}
    state[KEYS[0]], state[KEYS[3]] = torch.zeros(5, 6), torch.zeros(8, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"(?s)fc1\.lora_A\.weight: \(5, 6\).*\(2, 6\).*fc2\.lora_B"):
        set_peft_model_state_dict(model, state)
    assert same(model.state_dict(), before)
    with pytest.warns(PeftWarning, match="left out"), pytest.warns(MissingTensorsWarning):
        set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    got = get_peft_model_state_dict(model)
    assert torch.equal(got[KEYS[1]], state[KEYS[1]]) and not torch.equal(got[KEYS[0]], state[KEYS[0]][:2])


def test_unknown_and_merged_adapters_are_refused():
    model = adapted()
    state = get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="Did you mean 'default'"):
        set_peft_model_state_dict(model, state, adapter_name="defalt")
    with pytest.raises(ValueError, match="has no adapters"):
        get_peft_model_state_dict(mlp())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        set_peft_model_state_dict(model, state)


# The base model's own state -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_base_state_has_its_original_names(wrapped):
    config = lora(modules_to_save=["head"], use_dora=True)
    want = {k: v.clone() for k, v in mlp().state_dict().items()}
    model = get_peft_model(mlp(), config) if wrapped else inject_adapter_in_model(config, mlp())
    assert same(get_base_model_state_dict(model), want)
    new = {k: v + 1 for k, v in want.items()}
    set_base_model_state_dict(model, new)
    assert same(get_base_model_state_dict(model), new)
    with pytest.raises(RuntimeError, match=r"missing 'fc1\.weight'"):
        set_base_model_state_dict(model, {k: v for k, v in new.items() if k != "fc1.weight"})
    result = set_base_model_state_dict(model, {"fc1.weight": want["fc1.weight"], "odd": X}, strict=False)
    assert result.unexpected_keys == ["odd"] and "fc2.weight" in result.missing_keys
    assert torch.equal(get_base_model_state_dict(model)["fc1.weight"], want["fc1.weight"])


# Files --------------------------------------------------------------------------------------------------


def test_the_layout_on_disk(tmp_path):
    model = adapted()
    model.add_adapter("other", lora(r=3))
    model.save_pretrained(tmp_path, verify=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS, "other"]
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["inference_mode"] is True and model.peft_config["default"].inference_mode is False
    assert config["auto_mapping"] == {"base_model_class": "MLP", "parent_library": MLP.__module__}
    with safe_open(str(tmp_path / WEIGHTS), "pt") as file:
        assert file.metadata()["format"] == "pt" and sorted(file.keys()) == KEYS
    assert "library_name: peft" in (tmp_path / "README.md").read_text().replace('"', "")


def test_selected_adapters(tmp_path):
    model = adapted()
    model.add_adapter("other", lora())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / WEIGHTS).exists() and not (tmp_path / WEIGHTS).exists()
    with pytest.raises(ValueError, match="Did you mean 'other'"):
        model.save_pretrained(tmp_path, selected_adapters=["othr"])


def test_a_save_without_adapters_is_refused(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="selected_adapters is empty; the model has 'default'"):
        model.save_pretrained(tmp_path / "out", selected_adapters=[])
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="no adapter, so there is nothing to save"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_and_other_processes(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        adapted().save_pretrained(tmp_path / "file")
    adapted().save_pretrained(tmp_path / "rank1", is_main_process=False, state_dict={})
    assert list((tmp_path / "rank1").iterdir()) == []


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["head"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
    ],
)
@pytest.mark.parametrize("meta", [False, True])
def test_save_and_load_give_the_same_outputs(tmp_path, safe, changes, meta):
    model = adapted(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    want = model(X)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not safe else "error", PeftWarning)
        again = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=meta)
    assert torch.equal(again(X), want)
    assert not any(p.requires_grad for n, p in again.named_parameters()) and not again.training
    assert same(get_peft_model_state_dict(again), get_peft_model_state_dict(model))


def test_several_adapters_come_back_from_their_folders(tmp_path):
    model = adapted()
    model.add_adapter("other", lora(r=3))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    result = again.load_adapter(tmp_path / "other", "other")
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert again.active_adapters == ["default"]
    assert not any(p.requires_grad for p in again.adapter_parameters("other").values())
    for name in ("default", "other"):
        one, two = (get_peft_model_state_dict(m, adapter_name=name) for m in (model, again))
        assert same(one, two)
    third = PeftModel.from_pretrained(mlp(), tmp_path, subfolder="other", adapter_name="third")
    model.set_adapter("other")
    assert torch.equal(third(X), model(X)) and third.active_adapter == "third"


def test_a_trainable_load_trains_and_keeps_the_mode(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp().train(), tmp_path, is_trainable=True)
    assert model.training and all(p.requires_grad for p in model.adapter_parameters("default").values())
    model.load_adapter(tmp_path, "more", is_trainable=True)
    assert model.training and all(p.requires_grad for p in model.adapter_parameters("more").values())


def test_loading_over_an_existing_adapter_serves_the_optimizer(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    saved = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(X).square().mean().backward()
    optimizer.step()
    model.train()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert model.training and all(p is parameters[n] for n, p in model.named_parameters())
    assert same(get_peft_model_state_dict(model), saved)
    model.load_adapter(tmp_path, "default")
    assert not model.training
    assert all(p.requires_grad for p in model.adapter_parameters("default").values())  # resumed training goes on


def test_the_class_follows_the_task(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["auto_mapping"] is None
    assert type(PeftModel.from_pretrained(llama(), tmp_path)).__name__ == "PeftModelForCausalLM"


def test_a_passed_configuration_must_be_one(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PeftConfig"):
        PeftModel.from_pretrained(mlp(), tmp_path, config={"r": 2})
    model = PeftModel.from_pretrained(mlp(), tmp_path, config=lora())
    assert model.peft_config["default"].inference_mode


def test_key_mapping_renames_below_the_prefix(tmp_path):
    adapted().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({k.replace(".fc", ".old.fc"): v for k, v in state.items()}, tmp_path / WEIGHTS)
    model = PeftModel.from_pretrained(mlp(), tmp_path, key_mapping={r"^old\.": "", "^fc": "never."})
    assert torch.equal(model(X), adapted()(X))


# Bad files ----------------------------------------------------------------------------------------------


def truncate(folder: Path):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def garble(folder: Path):
    (folder / WEIGHTS).write_bytes(b"no tensors")


def other_base(folder: Path):
    state = load_file(folder / WEIGHTS)
    save_file({k: torch.zeros(v.shape[0], v.shape[1] + 1) for k, v in state.items()}, folder / WEIGHTS)


def no_key_fits(folder: Path):
    save_file({k.replace("fc", "dense"): v for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


BAD = [
    (truncate, ValueError, f"{WEIGHTS}.*truncated"),
    (garble, ValueError, f"{WEIGHTS}.*(?:truncated|complete)"),
    (lambda f: (f / WEIGHTS).unlink(), ValueError, "Can't find"),
    (lambda f: (f / CONFIG).unlink(), ValueError, "Can't find"),
    (other_base, RuntimeError, "size mismatch"),
    (no_key_fits, ValueError, "nothing was loaded"),
]


@pytest.mark.parametrize(("spoil", "error", "text"), BAD)
def test_a_failed_load_changes_nothing(tmp_path, spoil, error, text):
    adapted().save_pretrained(tmp_path)
    spoil(tmp_path)
    base = mlp()
    modules, want = [n for n, _ in base.named_modules()], base(X)
    with pytest.raises(error, match=text):
        PeftModel.from_pretrained(base, tmp_path)
    assert [n for n, _ in base.named_modules()] == modules and not hasattr(base, "peft_config")
    assert torch.equal(base(X), want) and all(p.requires_grad for p in base.parameters())
    model = adapted()
    modules, before = [n for n, _ in model.named_modules()], model(X)
    with pytest.raises(error, match=text):
        model.load_adapter(tmp_path, "more")
    with pytest.raises(error, match=text):
        if spoil is BAD[3][0]:
            raise ValueError("Can't find: the configuration of a known adapter is not read")
        model.load_adapter(tmp_path, "default")
    assert [n for n, _ in model.named_modules()] == modules and list(model.peft_config) == ["default"]
    assert torch.equal(model(X), before) and model.active_adapters == ["default"]


def test_nan_weights_are_named(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.base_model.model.fc1.lora_A["default"].weight[0, 0] = float("nan")
    for step in (lambda: model.save_pretrained(tmp_path), lambda: load_peft_weights(str(tmp_path))):
        with pytest.warns(PeftWarning, match=r"NaN or infinite values in 'base_model\.model\.fc1\.lora_A\.weight'"):
            step()


class Evil:
    def __reduce__(self):
        return (os.system, ("true",))


def test_a_pickle_gives_tensors_only(tmp_path):
    adapted().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.warns(PeftWarning, match="pickle"):
        state = load_peft_weights(str(tmp_path))
    assert sorted(state) == KEYS
    torch.save({"a": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.warns(PeftWarning), pytest.raises(ValueError, match="refused"):
        load_peft_weights(str(tmp_path))


def test_a_crash_while_saving_leaves_the_old_files(tmp_path, monkeypatch):
    old = adapted()
    old.save_pretrained(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = adapted(r=4)

    def crash(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.peft_config["default"]), "save_pretrained", crash)
        with pytest.raises(OSError, match="no space"):
            model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    (tmp_path / ".saving-dead").mkdir()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)
    assert load_file(tmp_path / WEIGHTS)[KEYS[0]].shape == (4, 6)


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_files_can_be_read_by_whom_the_user_lets(tmp_path):
    (tmp_path / "usual").touch()
    adapted().save_pretrained(tmp_path)
    assert len({f.stat().st_mode for f in tmp_path.iterdir()}) == 1


def test_saving_in_the_other_format_removes_the_stale_file(tmp_path):
    adapted().save_pretrained(tmp_path)
    adapted(r=3).save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()


def test_no_network_is_touched(tmp_path, monkeypatch):
    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"

    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(llama(), tmp_path)


# Embeddings ---------------------------------------------------------------------------------------------


def embedding_keys(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, **options)
    return [k.removeprefix("base_model.model.") for k in state if "lora" not in k]


def test_embeddings_are_saved_where_they_are_needed(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    both = ["model.embed_tokens.weight", "lm_head.weight"]
    assert embedding_keys(model) == [] and embedding_keys(model, save_embedding_layers=False) == []
    assert embedding_keys(model, save_embedding_layers=True) == both
    model.get_base_model().resize_token_embeddings(40, mean_resizing=False)
    with pytest.warns(PeftWarning, match="vocabulary"):
        model.save_pretrained(tmp_path)
    assert embedding_keys(model) == both
    again = PeftModel.from_pretrained(llama(vocab=40), tmp_path)
    assert torch.equal(again.get_base_model().lm_head.weight, model.get_base_model().lm_head.weight)


def test_a_vocabulary_changed_before_wrapping_is_noticed(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path)
    base = type(base).from_pretrained(tmp_path)
    base.resize_token_embeddings(40, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(embedding_keys(model)) == 2


@pytest.mark.parametrize(
    ("targets", "keys"),
    [
        (["embed_tokens", "q_proj"], ["model.embed_tokens.base_layer.weight"]),
        (["lm_head", "o_proj"], ["lm_head.base_layer.weight"]),
        (r".*\.q_proj|lm_head", ["lm_head.base_layer.weight"]),
    ],
)
def test_targeted_embeddings_are_saved_with_a_word(targets, keys):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets))
    with pytest.warns(PeftWarning, match="targets"):
        get_peft_model_state_dict(model)
    assert embedding_keys(model) == keys
    assert embedding_keys(model, save_embedding_layers=False) == []


def test_trained_copies_of_embeddings_are_saved_once(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(llama(), config)
    assert embedding_keys(model) == ["lm_head.weight"]
    assert sorted(embedding_keys(model, save_embedding_layers=True)) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]


@pytest.mark.parametrize("kind", ["copies", "rows"])
def test_second_names_of_saved_embeddings_in_files_of_the_other_library_are_passed_over(kind, tmp_path):
    chosen = {"modules_to_save": ["lm_head"]} if kind == "copies" else {"trainable_token_indices": [1, 2]}
    model = get_peft_model(llama(tie=kind == "rows"), LoraConfig(r=2, target_modules=["q_proj"], **chosen))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    file = tmp_path / "adapter_model.safetensors"
    state, head = load_file(file), "base_model.model.lm_head"
    if kind == "copies":
        second, first = f"{head}.modules_to_save.weight", f"{head}.weight"
        state[f"{head}.original_module.weight"] = model.get_base_model().lm_head.original_module.weight.detach()
    else:
        rows = "token_adapter.trainable_tokens_delta"
        second, first = f"{head}.{rows}", f"base_model.model.model.embed_tokens.{rows}"
    save_file({**state, second: state[first].clone()}, file, metadata={"format": "pt"})
    again = PeftModel.from_pretrained(llama(tie=kind == "rows"), tmp_path, strict=True)
    assert same(get_peft_model_state_dict(again), get_peft_model_state_dict(model))
    save_file({**state, f"{head}.modules_to_save.bias": state[first].clone()}, file, metadata={"format": "pt"})
    with pytest.warns(UnexpectedTensorsWarning, match=r"lm_head\.modules_to_save\.bias"):
        PeftModel.from_pretrained(llama(tie=kind == "rows"), tmp_path)


# PiSSA and the like as a plain LoRA ---------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"fc2": 5}}]
)
def test_an_adapter_that_started_in_the_base_is_written_as_a_plain_one(tmp_path, init, changes):
    model = adapted(init_lora_weights=init, **changes)
    torch.testing.assert_close(model(X), mlp()(X), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    want = model(X)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    config = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert config["init_lora_weights"] is True and config["r"] == 4
    assert model.peft_config["default"].r == 2 and model.peft_config["default"].init_lora_weights == init
    again = PeftModel.from_pretrained(mlp(), tmp_path / "plain")
    torch.testing.assert_close(again(X), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(X), want)
    same_kind = tmp_path / "same"
    model.save_pretrained(same_kind)
    torch.testing.assert_close(PeftModel.from_pretrained(mlp(), same_kind)(X), want, rtol=1e-5, atol=1e-6)


def test_conversions_that_cannot_be_right_are_refused(tmp_path):
    with pytest.warns(PeftWarning, match="cannot be converted"):
        model = adapted(init_lora_weights="pissa", use_rslora=True, rank_pattern={"fc1": 3})
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="use_rslora"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "start")
    plain = adapted()
    plain.save_pretrained(tmp_path / "plain")
    with pytest.warns(PeftWarning, match="leaves the base alone"):
        plain.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "plain")
    with pytest.raises(ValueError, match="another shape"):
        adapted(r=3, init_lora_weights="pissa").save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "plain"
        )


# The model card -----------------------------------------------------------------------------------------


def test_edits_of_the_card_survive(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    model.save_pretrained(tmp_path)
    text = card.read_text()
    assert "Written by hand." in text and text.count("### Framework versions") == 1 and text.count("- PEFT ") == 1


def test_a_card_tells_of_its_own_model_alone(tmp_path):
    pytest.importorskip("huggingface_hub")
    adapted().save_pretrained(tmp_path / "lora")
    config = IA3Config(target_modules=["fc1"], feedforward_modules=[])
    get_peft_model(mlp(), config).save_pretrained(tmp_path / "ia3")
    one, two = ((tmp_path / name / "README.md").read_text() for name in ("lora", "ia3"))
    assert "- lora" in one and "- lora" not in two
    assert one.partition("# Model Card")[2] == two.partition("# Model Card")[2] != ""


def test_the_card_without_huggingface_hub(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = adapted()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name:") and '- "lora"' in text and "- PEFT " in text
    (tmp_path / "README.md").write_text(text + "\nWritten by hand.\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text + "\nWritten by hand.\n"
