"""Every method over a base model whose weights accelerate keeps elsewhere until a layer runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import peft
from peft import LoraConfig, PeftModel, get_peft_model

from .configs import METHODS
from .tiny import IDS, TARGETS, llama, llama_config, logits, moved, seeded

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers", "4.57")
pytestmark = pytest.mark.filterwarnings("ignore:The embeddings are saved")

MORE = {
    "head": LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[3, 5]),
    "pissa": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "randlora": peft.RandLoraConfig(r=4, target_modules=["q_proj"]),
    "psoft": peft.PsoftConfig(r=2, target_modules=["q_proj"]),
    "hira": peft.HiraConfig(r=2, target_modules=TARGETS),
    "frod": peft.FrodConfig(target_modules=TARGETS, progressbar=False),
    "rows": peft.TrainableTokensConfig(token_indices=[3, 5]),
}
ALL = {**{name: c for name, c in METHODS.items() if name != "bias"}, **MORE}


def away(where: str, folder: Path) -> Any:
    """A Llama with biases, of which no weight is there."""
    base, here = llama(attention_bias=True), torch.device("cpu")
    if where == "cpu":
        return accelerate.cpu_offload(base, here)
    return accelerate.disk_offload(base, str(folder), here)


@pytest.mark.parametrize("method", ALL)
def test_a_method_runs_and_merges_over_weights_that_lie_elsewhere(method, tmp_path):
    here = moved(get_peft_model(llama(attention_bias=True), copy.deepcopy(ALL[method])))
    expected = logits(here)
    here.save_pretrained(tmp_path / "adapter")
    where = "disk" if method in ("lora", "dora", "head", "frod", "rows") else "cpu"
    model = PeftModel.from_pretrained(away(where, tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(attention_bias=True)))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method", ["lora", "dora", "oft", "head", "ln_tuning", "hira", "parameter", "frod", "rows", "tokens"]
)
def test_a_method_is_trained_over_weights_that_lie_elsewhere(method, tmp_path):
    gradients = []
    for base in (llama(attention_bias=True), away("cpu", tmp_path)):
        torch.manual_seed(0)
        model = get_peft_model(base, copy.deepcopy(ALL[method]))
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    here, there = gradients
    assert here.keys() == there.keys() and here
    for name, gradient in here.items():
        torch.testing.assert_close(there[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_copy_of_a_module_that_lies_elsewhere_holds_numbers_of_its_own(tmp_path):
    model = get_peft_model(away("disk", tmp_path), copy.deepcopy(ALL["head"]))
    head = model.base_model.model.lm_head
    assert head.original_module.weight.is_meta
    assert torch.equal(head.modules_to_save["default"].weight, llama(attention_bias=True).lm_head.weight)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.zero_()
    assert not logits(model.eval()).any()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_fused_experts_that_lie_elsewhere_are_adapted(where, tmp_path):
    def base() -> Any:
        settings = {"intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2}
        config = transformers.MixtralConfig(**{**llama_config().to_dict(), "model_type": "mixtral", **settings})
        return seeded(transformers.MixtralForCausalLM, config)

    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    here = moved(get_peft_model(base(), copy.deepcopy(config)), size=0.4)
    here.save_pretrained(tmp_path / "adapter")
    place = torch.device("cpu")
    far = accelerate.cpu_offload(base(), place) if where == "cpu" else accelerate.disk_offload(base(), tmp_path, place)
    model = PeftModel.from_pretrained(far, tmp_path / "adapter", is_trainable=True)
    plain = logits(base())
    assert not torch.allclose(logits(here), plain, atol=1e-2)
    torch.testing.assert_close(logits(model), logits(here))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    gradients = []
    for m in (here, model):
        m(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in m.named_parameters() if "lora_" in n})
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(here), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning", "words"])
def test_prompts_stand_before_words_that_lie_elsewhere(method, tmp_path):
    config = {
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
        "words": peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[4, 5], cpt_tokens_type_mask=[1, 2]),
    }[method]
    answers = []
    for base in (llama(attention_bias=True), away("cpu", tmp_path)):
        torch.manual_seed(0)
        model = moved(get_peft_model(base, copy.deepcopy(config)))
        answers.append(logits(model))
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(away("cpu", tmp_path), tmp_path / "adapter")
        torch.testing.assert_close(logits(loaded.eval()), answers[-1])
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_embeddings_that_lie_elsewhere_are_saved_and_loaded(where, tmp_path):
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    base = llama(attention_bias=True)
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(1.0)  # new words, say
    here = moved(get_peft_model(base, copy.deepcopy(config)))
    here.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model = PeftModel.from_pretrained(away(where, tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(here))
    model.save_pretrained(tmp_path / "again", save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(llama(attention_bias=True), tmp_path / "again")
    torch.testing.assert_close(logits(loaded), logits(here))


def test_an_adapter_that_lies_elsewhere_is_saved(tmp_path):
    model = moved(get_peft_model(llama(), copy.deepcopy(ALL["head"])))
    expected = logits(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
