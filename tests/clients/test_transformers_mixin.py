"""Adapters that models of transformers add, load, switch, delete and save themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import peft
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from . import tiny
from .tiny import TARGETS, llama, logits, moved, same, seeded, tensors

transformers = pytest.importorskip("transformers", "4.57")
since_5 = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="new in transformers 5")


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **changes})


def with_two() -> Any:
    """A Llama with the adapters `one` and `two`, both with numbers of their own; `two` is active."""
    model = llama()
    for seed, name in enumerate(("one", "two"), 1):
        model.add_adapter(config(r=seed + 1), adapter_name=name)
        moved(model, seed)
    return model


@pytest.fixture
def folder(tmp_path) -> str:
    """An adapter's folder."""
    moved(get_peft_model(llama(), config()), 5).save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


# ---- adding --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_added_to_the_model_itself():
    model, base = llama(), logits(llama())
    model.name_or_path = "someone/model"
    own = config()
    model.add_adapter(own, adapter_name="mine")
    assert type(model) is transformers.LlamaForCausalLM
    assert model.peft_config == {"mine": own} and own.base_model_name_or_path == "someone/model"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".mine." in n
    }
    assert torch.equal(logits(model), base)
    model.add_adapter(LoHaConfig(r=2, target_modules=["o_proj"]))
    assert list(model.peft_config) == ["mine", "default"]
    assert model.active_adapters() == ["default"]


def test_what_cannot_be_added_is_refused_and_leaves_the_model_as_it_was():
    model = llama()
    with pytest.raises(TypeError, match="PeftConfig"):
        model.add_adapter({"peft_type": "LORA"})
    model = llama()
    model.add_adapter(config())
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(config())
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="q_porj"):
        model.add_adapter(config(target_modules=["q_porj"]), "other")
    assert list(model.state_dict()) == names and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", ["bert", "t5", "wav2vec2"])
def test_targets_are_found_by_the_model_s_type_when_none_are_named(kind):
    configs = {
        "bert": (transformers.BertModel, tiny.bert_config()),
        "t5": (transformers.T5Model, transformers.T5Config(d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        "wav2vec2": (
            transformers.Wav2Vec2ForCTC,
            transformers.Wav2Vec2Config(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8,),
                conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1, num_conv_pos_embeddings=3,
                num_conv_pos_embedding_groups=1, vocab_size=9,
            ),
        ),
    }  # fmt: skip
    model = seeded(*configs[kind])
    if kind == "wav2vec2":
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        assert isinstance(model.lm_head, peft.tuners.lora.LoraLayer)  # asked by models that exchange their heads
        return
    model.add_adapter(LoraConfig(r=2, task_type=peft.TaskType.FEATURE_EXTRACTION))
    wanted = {"bert": {"query", "value"}, "t5": {"q", "v"}}[kind]
    assert {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)} == wanted


# ---- switching -----------------------------------------------------------------------------------------------------


def test_one_adapter_is_chosen_then_several_then_none():
    model, base = with_two(), logits(llama())
    assert model.active_adapters() == ["two"]
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        alone[name] = logits(model)
    assert not torch.allclose(alone["one"], alone["two"])
    model.set_adapter(["two", "one"])
    assert model.active_adapters() == ["two", "one"]
    both = logits(model)
    for layer in (m for m in model.modules() if isinstance(m, BaseTunerLayer)):
        layer.merge()
    torch.testing.assert_close(logits(model), both)
    for layer in (m for m in model.modules() if isinstance(m, BaseTunerLayer)):
        layer.unmerge()
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), both)
    model.set_adapter("one")
    assert torch.equal(logits(model), alone["one"])


def test_switching_needs_names_that_exist():
    model = llama()
    for call in (model.disable_adapters, model.enable_adapters, model.active_adapters):
        with pytest.raises(ValueError, match="No adapter loaded"):
            call()
    model.add_adapter(config())
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("other")
    with pytest.raises(ValueError, match="could not be found"):
        model.set_adapter(["default", "other"])


def test_whole_modules_follow_their_adapter():
    model = llama()
    for seed, name in enumerate(("one", "two"), 1):
        model.add_adapter(config(modules_to_save=["lm_head"]), adapter_name=name)
        moved(model, seed)
    answers = []
    for name in ("one", "two"):
        model.set_adapter(name)
        head = model.lm_head
        assert head.active_adapter == name and head.modules_to_save[head.active_adapter].weight is head.weight
        answers.append(logits(model))
    assert not torch.equal(*answers)
    assert isinstance(model.lm_head, peft.utils.ModulesToSaveWrapper)
    with pytest.raises(ValueError, match="Only one adapter can be active"):
        model.set_adapter(["one", "two"])
    model.disable_adapters()
    assert torch.equal(logits(model), logits(llama()))


def test_adapters_of_several_methods_are_switched_alike():
    model = llama()
    configs = {"lora": config(), "lokr": LoKrConfig(r=2, target_modules=["o_proj"])}
    for seed, (name, own) in enumerate(configs.items(), 1):
        model.add_adapter(own, adapter_name=name)
        moved(model, seed)
    model.set_adapter(["lora", "lokr"])
    both = logits(model)
    for name in configs:
        model.set_adapter(name)
        assert not torch.equal(logits(model), both)


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_folder_is_loaded_for_inference_or_for_training(is_trainable, folder):
    model = llama().train()
    info = model.load_adapter(folder, is_trainable=is_trainable)
    if info is not None:  # since transformers 5
        assert not info.missing_keys and not info.unexpected_keys
    assert model.peft_config["default"].inference_mode == (not is_trainable)
    assert model.training == is_trainable
    assert any(p.requires_grad for p in model.parameters()) == is_trainable
    expected = PeftModel.from_pretrained(llama(), folder)
    assert torch.equal(logits(model.eval()), logits(expected))


def test_an_adapter_to_be_trained_is_in_training_beside_a_base_that_is_not(folder):
    model = llama().eval()
    model.load_adapter(folder, is_trainable=True)
    for name, module in model.named_modules():
        if not list(module.children()):
            assert module.training == ("lora_" in name)
            assert all(p.requires_grad == ("lora_" in name) for p in module.parameters())


def test_a_configuration_and_a_state_are_loaded_without_files(folder):
    model = llama()
    model.load_adapter(peft_config=config(), adapter_state_dict=dict(tensors(folder)), adapter_name="given")
    expected = PeftModel.from_pretrained(llama(), folder)
    assert torch.equal(logits(model), logits(expected))
    assert list(model.peft_config) == ["given"]


def test_loading_says_what_is_wrong(folder, tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="peft_model_id"):
        model.load_adapter()
    with pytest.raises((ValueError, OSError)):
        model.load_adapter(str(tmp_path / "nothing"))
    model.load_adapter(folder)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(folder)


@since_5
def test_tensors_that_a_file_lacks_are_reported_by_their_live_names(folder):
    state = tensors(folder)
    dropped = next(key for key in state if "lora_B" in key)
    live = dropped.removeprefix("base_model.model.").replace(".lora_B.", ".lora_B.default.")
    model = llama()
    info = model.load_adapter(peft_config=config(), adapter_state_dict={k: v for k, v in state.items() if k != dropped})
    assert info.missing_keys == {live} and live in dict(model.named_parameters())


@since_5
def test_a_file_in_the_older_format_is_loaded(tmp_path):
    model = moved(get_peft_model(llama(), config()))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    there = llama()
    there.load_adapter(str(tmp_path), use_safetensors=False)
    assert torch.equal(logits(there), logits(model))


def test_a_subfolder_is_read_and_several_adapters_live_side_by_side(tmp_path):
    model = get_peft_model(llama(), config())
    model.add_adapter("other", IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.set_requires_grad("other")
    moved(model)
    model.save_pretrained(tmp_path)
    there = llama()
    there.load_adapter(str(tmp_path), adapter_name="a")
    there.load_adapter(str(tmp_path), adapter_name="b", adapter_kwargs={"subfolder": "other"})
    for mine, name in (("a", "default"), ("b", "other")):
        there.set_adapter(mine)
        model.set_adapter(name)
        assert torch.equal(logits(there), logits(model.eval()))


# ---- exchanging one adapter for another while the model runs -------------------------------------------------------


def other_folder(path: Any, **changes: Any) -> str:
    moved(get_peft_model(llama(), config(**changes)), 8).save_pretrained(path)
    return str(path)


@since_5
def test_an_adapter_is_exchanged_in_place(folder, tmp_path):
    model = llama()
    model.enable_peft_hotswap(target_rank=4)
    model.load_adapter(folder)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), folder)))
    second = other_folder(tmp_path / "second")
    model.load_adapter(second, adapter_name="default")  # by itself: the name is taken, and exchanging is enabled
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), second)))
    assert [m for m in model.modules() if isinstance(m, BaseTunerLayer)] == layers
    model.load_adapter(folder, adapter_name="default", hotswap=True)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), folder)))


@since_5
def test_what_cannot_be_exchanged_is_refused(folder):
    model = llama()
    with pytest.raises(ValueError, match="must already be an existing adapter"):
        model.load_adapter(folder, hotswap=True)
    model.add_adapter(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), adapter_name="x")
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(folder, adapter_name="x", hotswap=True)
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        model.enable_peft_hotswap()


# ---- states, saving, deleting --------------------------------------------------------------------------------------


def test_a_state_has_neither_prefix_nor_name():
    model = with_two()
    states = {name: model.get_adapter_state_dict(name) for name in ("one", "two")}
    assert same(model.get_adapter_state_dict(), states["two"])
    for name, state in states.items():
        parameters = dict(model.named_parameters())
        for key, value in state.items():
            stem = key.removesuffix(".weight")
            assert "base_model" not in key and name not in key
            assert torch.equal(parameters[f"{stem}.{name}.weight"], value)
        assert len(state) == 2 * len(TARGETS) * 2
    shifted = {key: value + 1 for key, value in model.state_dict().items()}
    given = model.get_adapter_state_dict("one", state_dict=shifted)
    assert same(given, {key: value + 1 for key, value in states["one"].items()})


def test_the_active_adapter_is_saved_as_a_peft_model_would(tmp_path):
    model = with_two()
    model.set_adapter("one")
    model.save_pretrained(tmp_path)
    saved = {key.removeprefix("base_model.model."): value for key, value in tensors(tmp_path).items()}
    assert same(saved, model.get_adapter_state_dict("one"))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["r"] == 2 and set(written["target_modules"]) == {*TARGETS}
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    model.save_pretrained(tmp_path / "plain", save_peft_format=False)
    assert not any(key.startswith("base_model") for key in tensors(tmp_path / "plain"))
    model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="ultiple active adapters"):
        model.save_pretrained(tmp_path)


def test_adapters_are_deleted_one_by_one_or_together():
    model = with_two()
    model.set_adapter("one")
    alone = logits(model)
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"] and torch.equal(logits(model), alone)
    assert not any(".two." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="not present"):
        model.delete_adapter("two")
    model.add_adapter(config(), adapter_name="two")
    model.delete_adapter(["one", "two"])
    assert not hasattr(model, "peft_config") and not model._hf_peft_config_loaded
    assert torch.equal(logits(model), logits(llama()))
    model.add_adapter(config(), adapter_name="two")
    assert model.active_adapters() == ["two"]


@pytest.mark.parametrize("own", [config(), LoKrConfig(r=2, target_modules=TARGETS), peft.OFTConfig(
    oft_block_size=4, target_modules=TARGETS
)], ids=["lora", "lokr", "oft"])  # fmt: skip
def test_names_of_tensors_hold_the_prefix_by_which_transformers_knows_them(own):
    model = llama()
    before = {name for name, _ in model.named_parameters()}
    model.add_adapter(own, adapter_name="mine")
    prefix = f"{own.peft_type.value.lower()}_"
    added = {name for name, _ in model.named_parameters()} - before
    new = {name for name in added if ".base_layer." not in name}
    assert new and all("mine" in name for name in new)
    assert all(prefix in name for name in new)


@pytest.mark.parametrize("trainable", [False, True])
def test_trained_tokens_of_tied_embeddings_are_still_one_after_a_load(trainable, tmp_path):
    tied = {"tie_word_embeddings": True}
    model = llama(**tied)
    model.add_adapter(config(trainable_token_indices=[3, 5]))
    moved(model, size=0.5).save_pretrained(tmp_path)
    found = llama(**tied)
    found.load_adapter(str(tmp_path), is_trainable=trainable)
    torch.testing.assert_close(logits(found.eval()), logits(model), rtol=0, atol=0)
    assert sum("trainable_tokens_delta" in n for n, _ in found.named_parameters()) == 1


@pytest.mark.parametrize("first", ["a", "b"])
def test_adapters_with_and_without_whole_modules_are_switched(first):
    model = llama()
    configs = {"a": config(modules_to_save=["lm_head"]), "b": config()}
    for name in (first, "ab".replace(first, "")):
        model.add_adapter(configs[name], adapter_name=name)
        moved(model)
    plain, head = model.lm_head.original_module, model.lm_head.modules_to_save["a"]
    assert not torch.equal(plain.weight, head.weight)
    for names, runs in (("a", head), ("b", plain), (["b", "a"], head), (["b"], plain)):
        model.set_adapter(names)
        assert model.active_adapters() == ([names] if isinstance(names, str) else names)
        assert model.lm_head.weight is runs.weight and head.weight.requires_grad is (runs is head)
        hidden = model.model(tiny.IDS).last_hidden_state
        torch.testing.assert_close(model(tiny.IDS).logits, hidden @ runs.weight.T)
