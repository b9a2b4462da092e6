"""Prompts beside adapters of layers, and beside each other, in one model."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from test_prompts import K, bert, config, gpt2, llama, t5, tasks, text

pytest.importorskip("transformers")

KINDS = ("lora", "oft", "prompt", "prefix")
PAIRS = [p for p in itertools.product(KINDS, repeat=2) if {"prompt", "prefix"} & {*p}]
each_pair = pytest.mark.parametrize("first, second", PAIRS)
WORDS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def setting(kind: str, task: str = "CAUSAL_LM", **more: Any) -> Any:
    targets = ["query"] if task == "SEQ_CLS" else ["q_proj", "v_proj"]
    if more.pop("gpt2", False):
        targets, more = ["c_attn"], {**more, **({} if kind in ("prompt", "prefix") else {"fan_in_fan_out": True})}
    if kind == "lora":
        return LoraConfig(r=4, target_modules=targets, task_type=task, **more)
    if kind == "oft":
        return peft.OFTConfig(oft_block_size=4, target_modules=targets, task_type=task, **more)
    return config(kind, task, **more)


def moved(model: Any) -> Any:
    """The model with trained-looking adapters."""
    for i, name in enumerate(sorted(model.peft_config)):
        draw = torch.Generator().manual_seed(10 + i)
        for p in model.adapter_parameters(name).values():
            p.data += 0.3 * torch.randn(p.shape, generator=draw)
    return model.eval()


def both(first: str, second: str, base: Any = llama, active: bool = True, **more: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base(), setting(first, **more), adapter_name="one")
    model.add_adapter("two", setting(second, **more))
    moved(model)
    if active:
        model.set_adapter(["one", "two"])
    return model


def logits(model: Any, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**text(), **given}).logits


def greedy(model: Any) -> torch.Tensor:
    """Words that the forward alone finds."""
    ids = text()["input_ids"]
    for _ in range(WORDS["max_new_tokens"]):
        scores = logits(model, input_ids=ids, attention_mask=torch.ones_like(ids))[:, -1]
        scores[:, 2] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1)[:, None]], 1)
    return ids


@each_pair
def test_both_act_in_the_forward_and_in_generation(first: str, second: str) -> None:
    model = both(first, second)
    found = logits(model)
    assert found.shape[1] == 5 + K * [first, second].count("prompt")
    for name in ("one", "two"):
        model.set_adapter(name)
        assert not torch.allclose(logits(model)[:, -5:], found[:, -5:], atol=1e-4)
    model.set_adapter(["one", "two"])
    words = model.generate(**text(), **WORDS)
    assert torch.equal(words, greedy(model))
    assert model.generate(**text(), **WORDS, num_beams=3).shape == words.shape


@pytest.mark.parametrize(
    "first, second", [("lora", "prompt"), ("prompt", "lora"), ("lora", "prefix"), ("prefix", "lora")]
)
def test_a_prompt_acts_on_the_model_whose_layers_are_adapted(first: str, second: str) -> None:
    model = both(first, second)
    name, kind = next((n, k) for n, k in (("one", first), ("two", second)) if k != "lora")
    base = copy.deepcopy(model)
    base.set_adapter("two" if name == "one" else "one")
    merged = base.merge_and_unload()
    assert not any("lora" in n or "prompt" in n for n, _ in merged.named_parameters())
    again = get_peft_model(merged, setting(kind)).eval()
    for target, source in zip(again.prompt_encoder.parameters(), model.prompt_encoder[name].parameters(), strict=True):
        target.data.copy_(source)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_two_prompts_stand_one_behind_the_other_in_the_order_of_activation() -> None:
    model = both("prompt", "prompt")
    prompts = [model.prompt_encoder[n].prompt(2) for n in ("one", "two")]
    base = model.get_base_model()
    for names in (["one", "two"], ["two", "one"]):
        model.set_adapter(names)
        assert model.active_adapters == names
        parts = prompts if names[0] == "one" else prompts[::-1]
        wanted = base(inputs_embeds=torch.cat([*parts, base.get_input_embeddings()(text()["input_ids"])], 1)).logits
        torch.testing.assert_close(logits(model), wanted)
        assert torch.equal(model.get_prompt(2), torch.cat(parts, 1))


def test_two_prefixes_stand_in_one_cache() -> None:
    model = both("prefix", "prefix")
    cache = model.get_prompt(2)
    alone = []
    for name in ("one", "two"):
        model.set_adapter(name)
        alone.append(model.get_prompt(2))
    for layer, *parts in zip(cache.layers, *(c.layers for c in alone), strict=True):
        assert torch.equal(layer.keys, torch.cat([p.keys for p in parts], 2))
        assert torch.equal(layer.values, torch.cat([p.values for p in parts], 2))


@each_pair
def test_everything_that_is_active_learns(first: str, second: str) -> None:
    model = both(first, second).train()
    out = model(**text(), labels=text()["input_ids"])
    out.loss.backward()
    for name in ("one", "two"):
        assert all(p.grad is not None and p.grad.any() for p in model.adapter_parameters(name).values())
    model.set_adapter("one")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.adapter_parameters("one"))
    model.set_requires_grad("two")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained | set(model.adapter_parameters("two"))
    optimizer, before = torch.optim.SGD(model.adapter_parameters("two").values(), lr=0.1), logits(model)
    optimizer.step()
    assert torch.equal(before, logits(model))


@each_pair
def test_each_adapter_has_its_folder_and_either_may_be_loaded_first(first: str, second: str, tmp_path: Path) -> None:
    model = both(first, second)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    for name, other in (("one", "two"), ("two", "one")):
        model.set_adapter(name)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name).eval()
        assert torch.equal(logits(again), logits(model))
        keys = set(get_peft_model_state_dict(again, adapter_name=name))
        assert keys == set(get_peft_model_state_dict(model, adapter_name=name))
        again.load_adapter(tmp_path / other, other)
        assert again.active_adapters == [name]
        assert torch.equal(logits(again), logits(model))
        again.set_adapter(["one", "two"])
        assert torch.equal(logits(again), wanted)


@each_pair
@pytest.mark.parametrize("base", [llama, gpt2])
def test_samples_of_a_batch_may_have_adapters_of_other_kinds(first: str, second: str, base: Any) -> None:
    model = both(first, second, base, active=False, gpt2=base is gpt2)
    names, given = ["two", "__base__", "one"], text(batch=3)
    found = model(**given, adapter_names=names).logits
    words = model.generate(**given, adapter_names=names, **WORDS)
    for i, name in enumerate(names):
        row = {k: v[i : i + 1] for k, v in given.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone, said = logits(model, **row), model.generate(**row, **WORDS)
        else:
            model.set_adapter(name)
            alone, said = logits(model, **row), model.generate(**row, **WORDS)
        torch.testing.assert_close(found[i : i + 1, -5:], alone[:, -5:], rtol=1e-4, atol=1e-5)
        assert torch.equal(words[i : i + 1], said)


@each_pair
def test_adapters_are_disabled_deleted_and_unloaded(first: str, second: str) -> None:
    model = both(first, second)
    torch.manual_seed(0)
    plain, found = logits(llama()), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), found)
    model.disable_adapter_layers()
    assert torch.equal(logits(model), plain)
    assert not any(p.requires_grad for p in model.parameters())
    model.enable_adapter_layers()
    assert torch.equal(logits(model), found)
    model.set_adapter("two")
    alone = logits(model)
    model.set_adapter(["one", "two"])
    twin = copy.deepcopy(model)
    twin.delete_adapter("one")
    assert twin.active_adapters == ["two"] and not any(".one" in n for n, _ in twin.named_parameters())
    assert torch.equal(logits(twin), alone)
    twin.delete_adapter("two")
    assert torch.equal(logits(twin), plain)
    assert torch.equal(logits(model), found)
    assert torch.equal(model.unload()(**text()).logits, plain)


@pytest.mark.parametrize(
    "first, second", [("lora", "prompt"), ("prompt", "lora"), ("lora", "prefix"), ("prefix", "lora")]
)
def test_what_has_a_weight_merges_and_the_prompt_is_named(first: str, second: str) -> None:
    model = both(first, second)
    wanted = logits(model)
    prompt, lora = ("one", "two") if second == "lora" else ("two", "one")
    for act in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter([prompt])):
        with pytest.raises(NotImplementedError, match=f"nothing to merge. Leave .'{prompt}'. out"):
            act()
    with pytest.raises(NotImplementedError, match=prompt):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix")
    model.merge_adapter([lora])
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)
    status = model.get_model_status()
    assert status.available_adapters == [lora] and set(status.peft_types) == {"one", "two"}


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_failed_second_adapter_leaves_nothing_behind(kind: str, tmp_path: Path) -> None:
    other = {"lora": "prefix", "prefix": "lora"}[kind]
    model = moved(get_peft_model(llama(), setting(kind)))
    modules, wanted, flags = list(model.state_dict()), logits(model), [p.requires_grad for p in model.parameters()]
    bad = (
        LoraConfig(target_modules=["nowhere"]) if other == "lora" else peft.PrefixTuningConfig(num_virtual_tokens=3)
    )  # no such module; no task type
    with pytest.raises(ValueError, match=r"nowhere|task_type"):
        model.add_adapter("two", bad)
    both(kind, other).save_pretrained(tmp_path)
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(Exception, match="adapter_model"):
        model.load_adapter(tmp_path / "two", "two")
    assert list(model.state_dict()) == modules and list(model.peft_config) == ["default"]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(logits(model), wanted)
    model.add_adapter("two", setting(other))
    assert torch.equal(logits(model), wanted)


def test_heads_are_kept_apart_and_saved_as_without_the_other_kind(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return bert("BertForSequenceClassification")

    for first, second in (("lora", "prefix"), ("prefix", "lora")):
        model = both(first, second, base, active=False, task="SEQ_CLS")
        with pytest.raises(ValueError, match="Only one adapter can be active for 'classifier'"):
            model.set_adapter(["one", "two"])
        folder = tmp_path / first
        model.save_pretrained(folder)
        for name, other in (("one", "two"), ("two", "one")):
            model.set_adapter(name)
            again = PeftModel.from_pretrained(base(), folder / name, adapter_name=name).eval()
            assert torch.equal(logits(again), logits(model))
            again.load_adapter(folder / other, other)
            again.set_adapter(other)
            model.set_adapter(other)
            assert torch.equal(logits(again), logits(model))


def test_an_encoder_with_a_decoder_may_have_both() -> None:
    more = {"task": "SEQ_2_SEQ_LM"}
    torch.manual_seed(0)
    model = get_peft_model(t5(), config("prefix", **more), adapter_name="one")
    model.add_adapter("two", config("multitask", **more))
    model.add_adapter("three", LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    moved(model).set_adapter(["one", "two", "three"])
    ids = text()["input_ids"]
    out = model(**text(), labels=ids[:, :4].contiguous(), **tasks("multitask"))
    out.loss.backward()
    for name in ("one", "two", "three"):
        assert any(p.grad is not None and p.grad.any() for p in model.adapter_parameters(name).values())
    assert model.generate(**text(), **tasks("multitask"), **WORDS).shape == (2, 5)


def test_the_loss_of_a_context_counts_its_own_labels_behind_another_prompt() -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), config("prompt"), adapter_name="one")
    model.add_adapter("two", config("cpt", cpt_tokens_type_mask=[1, 4, 8]))
    moved(model)
    labels, words = text()["input_ids"], torch.tensor([[3, 4, 5]] * 2)
    skipped = torch.full((2, K), -100)
    for names in (["one", "two"], ["two", "one"]):
        model.set_adapter(names)
        out = model(**text(), labels=labels)
        own = torch.where(torch.tensor([False, True, True]), words, -100)
        parts = [skipped, own] if names[0] == "one" else [own, skipped]
        target = torch.cat([*parts, labels], 1)[:, 1:]
        wanted = nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), target)
        torch.testing.assert_close(out.loss, wanted)
    model.add_adapter("three", config("cpt"))
    model.set_adapter(["two", "three"])
    assert logits(model).shape[1] == 5 + 2 * K
    with pytest.raises(ValueError, match="a loss of their own"):
        model(**text(), labels=labels)


@pytest.mark.parametrize("first, second", [("prompt", "lora"), ("lora", "prompt"), ("prefix", "prompt")])
def test_a_mixed_model_takes_prompts(first: str, second: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), setting(first), mixed=True)
    model.add_adapter("two", setting(second))
    moved(model).set_adapter(["default", "two"])
    out = model(**text(), labels=text()["input_ids"])
    assert out.loss.isfinite() and model.active_adapters == ["default", "two"]
    model.delete_adapter(["default", "two"])
    assert not model.peft_config


def test_prompts_of_other_sizes_cannot_share_a_cache() -> None:
    model = get_peft_model(llama(), config("prefix"))
    model.add_adapter("two", config("prefix", num_layers=2, token_dim=4, num_attention_heads=1))
    model.prompt_encoder["two"].heads = 1
    with pytest.raises(ValueError, match="must agree"):
        model.set_adapter(["default", "two"])
    assert model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="tokens in front"):
        model.add_adapter("three", config("prompt"))
        model.set_adapter(["default", "three"])
        model.get_prompt(1)


def test_a_changed_vocabulary_is_saved_with_a_prompt(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config("prompt")).eval()
    assert list(get_peft_model_state_dict(model)) == ["prompt_embeddings"]
    model.get_base_model().resize_token_embeddings(44)
    with pytest.warns(peft.PeftWarning, match="the vocabulary's size has changed"):
        model.save_pretrained(tmp_path)
    grown = llama()
    grown.resize_token_embeddings(44)
    again = PeftModel.from_pretrained(grown, tmp_path)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        here, there = (getattr(m.get_base_model(), name)().weight for m in (model, again))
        assert torch.equal(here, there)


def test_biases_trained_by_a_lora_are_those_of_the_model_alone() -> None:
    model = get_peft_model(gpt2(), config("p-tuning"))
    model.add_adapter("two", LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True))
    keys = get_peft_model_state_dict(model, adapter_name="two")
    assert any(k.endswith(".bias") for k in keys) and not any("prompt_encoder" in k for k in keys)
    assert set(model.adapter_parameters("default")) == {
        f"prompt_encoder.default.{n}" for n, _ in model.prompt_encoder["default"].named_parameters()
    }


def test_terms_of_the_loss_are_added_to_the_loss_of_a_context() -> None:
    model = get_peft_model(llama(), config("cpt"), adapter_name="one")
    adalora = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.add_adapter("two", adalora)
    moved(model).set_adapter(["one", "two"])
    found = []
    for weight in (0.0, 0.5, 1.0):
        model.peft_config["two"].orth_reg_weight = weight
        found.append(model(**text(), labels=text()["input_ids"]).loss.detach())
    assert found[2] > found[1] > found[0]
    torch.testing.assert_close(found[2] - found[1], found[1] - found[0])


@pytest.mark.filterwarnings("ignore:aLoRA")
@pytest.mark.parametrize("prompt", ["prompt", "prefix"])
def test_an_alora_finds_its_words_behind_a_prompt(prompt: str) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
                                               alora_invocation_tokens=[9]), adapter_name="one")  # fmt: skip
    model.add_adapter("two", config(prompt))
    moved(model).set_adapter(["one", "two"])
    given = text()
    given["input_ids"][given["input_ids"] == 9] = 8
    quiet = logits(model, **given)
    given["input_ids"][0, 2] = 9
    found, words = logits(model, **given), model.generate(**given, **WORDS)
    told = logits(model, **given, alora_offsets=[3, None])
    assert torch.equal(found, told) and torch.equal(found[1], quiet[1])
    model.set_adapter("two")
    assert not torch.allclose(logits(model, **given)[0, -3:], found[0, -3:], atol=1e-4)
    torch.testing.assert_close(logits(model, **given)[:, :-3], found[:, :-3])
    model.set_adapter(["one", "two"])
    assert torch.equal(model.generate(**given, **WORDS, use_cache=True), words)
    assert model.generate(**given, **WORDS, num_beams=2).shape == words.shape
    ids = given["input_ids"]
    for _ in range(4):
        scores = logits(model, input_ids=ids, attention_mask=torch.ones_like(ids))[:, -1]
        scores[:, 2] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1)[:, None]], 1)
    assert torch.equal(words, ids)
