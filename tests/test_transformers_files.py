"""The same adapter files through the methods of transformers' own models, and through ours."""

from __future__ import annotations

import json
import os

import pytest
import torch

import peft
from peft import PeftModel, get_peft_model

transformers = pytest.importorskip("transformers", "5.0")

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS = {
    "lora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS),
    "rslora with patterns": peft.LoraConfig(
        r=4, use_rslora=True, target_modules=TARGETS, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}
    ),
    "dora": peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "head": peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "tokens": peft.LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[3, 5]),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, target_modules=TARGETS),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "hra": peft.HRAConfig(r=2, target_modules=TARGETS),
    "fourierft": peft.FourierFTConfig(n_frequency=9, target_modules=TARGETS),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved Llama; a folder, so that every model is read from the same file."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def model_of(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


def trained(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("method", METHODS)
def test_what_a_peft_model_saves_a_model_of_transformers_loads(method, base, tmp_path):
    model = trained(get_peft_model(model_of(base), METHODS[method]))
    model.save_pretrained(tmp_path)
    there = model_of(base)
    there.load_adapter(str(tmp_path), adapter_name="own")
    torch.testing.assert_close(logits(there), logits(model))
    there.disable_adapters()
    torch.testing.assert_close(logits(there), logits(model_of(base)), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_model_of_transformers_saves_a_peft_model_loads(method, base, tmp_path):
    model = model_of(base)
    model.add_adapter(METHODS[method], adapter_name="own")
    trained(model).save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path))
    here = PeftModel.from_pretrained(model_of(base), tmp_path)
    torch.testing.assert_close(logits(here), logits(model))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "oft"])
def test_an_auto_class_reads_a_folder_of_an_adapter(method, base, tmp_path):
    model = trained(get_peft_model(model_of(base), METHODS[method]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(there), logits(model))
    here = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(here.eval()), logits(model))


@pytest.mark.parametrize("kind", ["VeraConfig", "VBLoRAConfig"])
def test_a_method_with_tensors_of_all_layers_says_that_it_needs_a_peft_model(kind, base):
    model = model_of(base)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="only a PeftModel can hold"):
        model.add_adapter(getattr(peft, kind)(r=2, target_modules=TARGETS))
    assert list(model.state_dict()) == before


def test_what_was_loaded_by_transformers_is_saved_again_the_same(base, tmp_path):
    model = trained(get_peft_model(model_of(base), METHODS["lora"]))
    model.save_pretrained(tmp_path / "a")
    there = model_of(base)
    there.load_adapter(str(tmp_path / "a"))
    there.save_pretrained(tmp_path / "b")
    here = PeftModel.from_pretrained(model_of(base), tmp_path / "b")
    here.save_pretrained(tmp_path / "c")
    from safetensors.torch import load_file

    a, b, c = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "abc")
    prefix = "base_model.model."
    assert {k: v.tolist() for k, v in a.items()} == {k: v.tolist() for k, v in c.items()}
    assert {k.removeprefix(prefix): v.tolist() for k, v in a.items()} == {
        k.removeprefix(prefix): v.tolist() for k, v in b.items()
    }
