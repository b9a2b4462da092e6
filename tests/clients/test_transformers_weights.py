"""How transformers' own loader reads adapters' files: the mapping that it asks for, and older files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion as conversion
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping, convert_peft_config_for_transformers

from .configs import METHODS
from .tiny import TARGETS, bert_config, llama, llama_config, logits, moved, seeded, tensors

transformers = pytest.importorskip("transformers", "5.0", reason="the loader is new in transformers 5")
loading = pytest.importorskip("transformers.core_model_loading")
pytestmark = pytest.mark.filterwarnings("ignore:The embeddings are saved")


def renamed(key: str, config: Any, model: Any = None, name: str = "mine") -> str:
    """Where transformers would put a tensor of a file."""
    given = conversion.get_model_conversion_mapping(model) if model is not None else None
    mapping = build_peft_weight_mapping(given, name, peft_config=config)
    renamings = [step for step in mapping if isinstance(step, loading.WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, loading.WeightConverter)]
    assert len(renamings) + len(converters) == len(mapping)
    return loading.rename_source_key(key, renamings, converters)[0]


@pytest.mark.parametrize("name", ["mine", "default", "lora_A", "v1", "a+b"])
@pytest.mark.parametrize("method", METHODS)
def test_each_saved_name_leads_to_a_live_one(method, name, tmp_path):
    model = llama()
    model.add_adapter(METHODS[method], adapter_name=name)
    live = set(model.state_dict())
    saved = peft.get_peft_model_state_dict(model, adapter_name=name)
    assert saved
    found = {renamed(f"base_model.model.{key}", METHODS[method], name=name) for key in saved}
    assert len(found) == len(saved) and found <= live


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_by_one_is_loaded_by_the_other(method, tmp_path):
    model = moved(get_peft_model(llama(), METHODS[method]))
    model.save_pretrained(tmp_path)
    there = llama()
    info = there.load_adapter(str(tmp_path), adapter_name="mine")
    assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
    torch.testing.assert_close(logits(there), logits(model))


def test_wrappers_tell_where_their_tensors_live():
    model = llama()
    config = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"], trainable_token_indices=[3])
    model.add_adapter(config, adapter_name="mine")
    live, found = set(model.state_dict()), {}
    for path, module in model.named_modules():
        if isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
            for key, name in module.adapter_state_dict_load_map("mine").items():
                found[f"{path}.{key}"] = f"{path}.{name}"
    assert found["lm_head.weight"] == "lm_head.modules_to_save.mine.weight"
    assert "model.embed_tokens.token_adapter.trainable_tokens_delta" in found
    assert set(found.values()) <= live
    assert set(found) <= set(peft.get_peft_model_state_dict(model, adapter_name="mine"))


def test_the_model_s_own_steps_follow_ours():
    own = [loading.WeightRenaming("a", "b")]
    mapping = build_peft_weight_mapping(own, "mine", peft_config=METHODS["lora"])
    assert mapping[-1] is own[0] and len(mapping) > 1
    assert build_peft_weight_mapping(None, "mine", peft_config=METHODS["lora"])
    assert own == [own[0]]  # the list that was given is left alone


def test_a_base_model_is_saved_under_its_own_names_once_the_adapter_is_gone(tmp_path):
    moved(get_peft_model(llama(), METHODS["lora"])).save_pretrained(tmp_path / "adapter")
    model = llama()
    model.load_adapter(str(tmp_path / "adapter"))
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "base")
    names = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert {name.replace(".base_layer.", ".") for name in names} == set(llama().state_dict())


def test_modules_that_were_renamed_since_are_found(tmp_path):
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=8,
    )  # fmt: skip
    kind, config = (
        transformers.LlavaForConditionalGeneration,
        transformers.LlavaConfig(vision_config=vision, text_config=llama_config()),
    )
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
    model = moved(get_peft_model(seeded(kind, config), lora))
    model.save_pretrained(tmp_path)
    old = {key.replace("model.language_model.", "language_model.model.", 1): v for key, v in tensors(tmp_path).items()}
    assert all(".language_model.model.layers." in key for key in old)
    save_file(old, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    there = seeded(kind, config)
    info = there.load_adapter(str(tmp_path))
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(logits(there), logits(model))


# ---- experts, which older files hold one by one --------------------------------------------------------------------

COUNT = 3
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}
EXPERTS = {
    "Mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), {"intermediate_size": 24, "num_local_experts": COUNT}),
    "Qwen3Moe": (
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
        {"moe_intermediate_size": 24, "num_experts": COUNT, "num_experts_per_tok": 2, "head_dim": 4},
    ),
}


def experts(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **EXPERTS[kind][2], initializer_range=0.3)
    return seeded(getattr(transformers, f"{kind}ForCausalLM"), config)


def old_folder(kind: str, names: tuple[str, ...], folder: Path, **settings: Any) -> Path:
    """A file as transformers 4 gave it: factors for each expert's projections."""
    block, (_, _, down), _ = EXPERTS[kind]
    generator, state = torch.Generator().manual_seed(0), {}

    def put(path: str, out: int, inner: int) -> None:
        for side, shape in (("A", (2, inner)), ("B", (out, 2))):
            key = f"base_model.model.model.layers.{path}.lora_{side}.weight"
            state[key] = 0.3 * torch.randn(shape, generator=generator)

    for layer in range(2):
        for name in names:
            if name == "q_proj":
                put(f"{layer}.self_attn.{name}", 16, 16)
            elif name == "gate":
                put(f"{layer}.{block}.gate", COUNT, 16)
            else:
                for expert in range(COUNT):
                    put(f"{layer}.{block}.experts.{expert}.{name}", *((16, 24) if name == down else (24, 16)))
    LoraConfig(**{"r": 2, "target_modules": list(names), "inference_mode": True, **settings}).save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def by_hand(kind: str, folder: Path, scaling: float) -> Any:
    """The base model with every factor's product added to its slice of the stack."""
    model, state = experts(kind), tensors(folder)
    block, names, _ = EXPERTS[kind]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key in (k for k in state if ".lora_A." in k):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace(block, "mlp")
            update = scaling * state[key.replace("lora_A", "lora_B")] @ state[key]
            if ".experts." not in path:
                parameters[f"{path}.weight"] += update
                continue
            stack, _, rest = path.partition(".experts.")
            number, name = rest.split(".")
            half = names.index(name)
            target = parameters[f"{stack}.experts.{'down_proj' if half == 2 else 'gate_up_proj'}"][int(number)]
            (target if half == 2 else target[24 * half : 24 * (half + 1)]).add_(update)
    return model


CHOICES = {
    "all": (0, 1, 2, "q_proj", "gate"),
    "both halves": (0, 1),
    "down": (2,),
    "router": ("gate", "q_proj"),
}


@pytest.mark.parametrize("way", ["transformers", "PeftModel", "transformers, exchanged"])
@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.filterwarnings("ignore::peft.PeftWarning")
def test_factors_of_single_experts_become_those_of_their_stack(kind, chosen, way, tmp_path):
    names = tuple(EXPERTS[kind][1][n] if isinstance(n, int) else n for n in CHOICES[chosen])
    folder = old_folder(kind, names, tmp_path, lora_alpha=3)
    expected = logits(by_hand(kind, folder, 3 / 2))
    model = experts(kind)
    plain = logits(model)
    if way == "PeftModel":
        model = PeftModel.from_pretrained(model, folder)
    else:
        info = model.load_adapter(str(folder))
        assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
    if way == "transformers, exchanged":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.zero_()
        info = model.load_adapter(str(folder), adapter_name="default", hotswap=True)
        assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_a_configuration_is_rewritten_for_the_stacks_in_place():
    model = experts("Mixtral")
    config = LoraConfig(r=2, target_modules=["w1", "w2", "w3", "q_proj"])
    convert_peft_config_for_transformers(config, model, conversion.get_model_conversion_mapping(model))
    assert set(config.target_modules) == {"q_proj"}
    assert {n.rpartition(".")[2] for n in config.target_parameters} == {"gate_up_proj", "down_proj"}
    with pytest.raises(ValueError, match="'w3'"):
        convert_peft_config_for_transformers(LoraConfig(target_modules=["w1"]), experts("Mixtral"), None)
    plain = LoraConfig(r=2, target_modules=["query"])
    before = dict(plain.__dict__)
    convert_peft_config_for_transformers(plain, seeded(transformers.BertModel, bert_config()), None)
    assert plain.__dict__ == before


def test_a_file_that_lacks_an_expert_is_reported_and_not_guessed(tmp_path):
    folder = old_folder("Mixtral", ("w1", "w3", "w2"), tmp_path)
    state = tensors(folder)
    lost = next(key for key in state if ".experts.1.w3.lora_B" in key)
    save_file({k: v for k, v in state.items() if k != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="conversion"):
        experts("Mixtral").load_adapter(str(folder))
