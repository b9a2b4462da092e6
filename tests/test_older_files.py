"""Adapters saved by releases from 0.3 on: their configurations are read, their tensors found, nothing guessed."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft import PeftConfig, PeftModel
from peft.errors import PeftWarning, UnknownFieldWarning

# What a configuration of LoRA gained, release by release; the first entry is the whole of 0.3.
HISTORY: dict[str, dict] = {
    "0.3": {
        "base_model_name_or_path": "somewhere/base", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": 6, "lora_dropout": 0.05, "modules_to_save": None,
        "peft_type": "LORA", "r": 2, "target_modules": ["fc"], "task_type": None,
    },
    "0.4": {"layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.5": {"auto_mapping": {"base_model_class": "Net", "parent_library": "nowhere"}},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"qalora_group_size": 16, "target_parameters": None, "use_qalora": False},
    "0.18": {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False,
             "peft_version": "0.18.0"},
}  # fmt: skip
EARLIEST = {"enable_lora": None, "merge_weights": False}  # 0.1 and 0.2

OTHERS = {
    "IA3": {"feedforward_modules": ["fc"], "target_modules": ["fc"], "init_ia3_weights": True, "fan_in_fan_out": False},
    "LOHA": {"r": 2, "alpha": 4, "target_modules": ["fc"], "use_effective_conv2d": False, "module_dropout": 0.0,
             "rank_dropout": 0.0, "init_weights": True, "layers_pattern": None, "rank_pattern": {}},
    "ADALORA": {"target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85,
                "orth_reg_weight": 0.5, "total_step": 100, "rank_pattern": None, "r": 8, "lora_alpha": 32,
                "target_modules": ["fc"]},
    "PREFIX_TUNING": {"num_virtual_tokens": 20, "token_dim": 8, "num_transformer_submodules": 1, "num_layers": 2,
                      "num_attention_heads": 2, "encoder_hidden_size": 8, "prefix_projection": False},
    "PROMPT_TUNING": {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
                      "tokenizer_name_or_path": None},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8,
                 "encoder_num_layers": 2, "encoder_dropout": 0.0},
    "BONE": {"r": 2, "target_modules": ["fc"], "init_weights": True, "bias": "none"},
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x)


def written(folder, values):
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def as_held(value):
    return set(value) if isinstance(value, list) else value


def of_release(release):
    values: dict = {}
    for name, fields in HISTORY.items():
        values |= fields
        if name == release:
            return values
    raise KeyError(release)


@pytest.mark.parametrize("release", HISTORY)
def test_lora_of_each_release_loads_without_a_word_and_computes_its_update(release, tmp_path):
    torch.manual_seed(0)
    values, base, x = of_release(release), Net(), torch.randn(5, 4)
    A, B = torch.randn(2, 4), torch.randn(3, 2)
    prefix = "base_model.model.fc.lora_"
    save_file({f"{prefix}A.weight": A, f"{prefix}B.weight": B}, tmp_path / "adapter_model.safetensors")
    want = base(x) + x @ A.T @ B.T * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(base, written(tmp_path, values))
    torch.testing.assert_close(model(x), want)


def test_the_fields_of_the_earliest_releases_are_named(tmp_path):
    folder = written(tmp_path, {**of_release("0.3"), **EARLIEST})
    with pytest.warns(UnknownFieldWarning, match=r"'enable_lora'.*'merge_weights'"):
        assert PeftConfig.from_pretrained(folder).r == 2


@pytest.mark.parametrize(
    "field, value",
    [
        ("enable_lora", [True, False, True]),
        ("use_next", True),
        ("next_config", {"k": 1}),
        ("block_pattern", {"fc": 2}),
        ("required_features", ["folded"]),
    ],
)
def test_an_unknown_field_that_changes_the_result_refuses(field, value, tmp_path):
    folder = written(tmp_path, {**of_release("0.18"), field: value})
    with pytest.raises(ValueError, match=rf"{field}=.*does not know"):
        PeftConfig.from_pretrained(folder)
    with pytest.warns(UnknownFieldWarning, match=field):
        PeftConfig.from_pretrained(written(tmp_path, {**of_release("0.18"), field: None}))


@pytest.mark.parametrize("kind", OTHERS)
def test_configurations_of_other_methods_load_without_a_word(kind, tmp_path):
    values = {"peft_type": kind, "base_model_name_or_path": "x", "inference_mode": True, **OTHERS[kind]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(written(tmp_path, values))
    assert {k: getattr(config, k) for k in OTHERS[kind]} == {k: as_held(v) for k, v in OTHERS[kind].items()}


def test_oft_of_another_parametrisation_is_refused_and_of_another_series_warned_about(tmp_path):
    values = {"peft_type": "OFT", "target_modules": ["fc"], "r": 2}
    with pytest.raises(ValueError, match="oft_block_size"):
        PeftConfig.from_pretrained(written(tmp_path, values))
    with pytest.warns(PeftWarning, match="older than release 0.18"):
        PeftConfig.from_pretrained(written(tmp_path, {**values, "oft_block_size": 0}))


def test_bone_is_what_miss_was_called(tmp_path):
    torch.manual_seed(0)
    base, x, D = Net(), torch.randn(5, 4), torch.randn(2, 3)
    save_file({"base_model.model.fc.bone_block": D}, tmp_path / "adapter_model.safetensors")
    folder = written(tmp_path, {"peft_type": "BONE", **OTHERS["BONE"]})
    want = base(x) + (x[:, :2] + x[:, 2:]) @ D
    model = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(model(x), want)
    model.save_pretrained(tmp_path / "new")
    assert PeftConfig.from_pretrained(tmp_path / "new").peft_type == "MISS"


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)

    def forward(self, x):
        return self.emb(x)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("version", [None, "0.21.2"])
def test_an_embedding_in_a_file_of_the_other_library_is_plain_whatever_its_start_is_called(kind, version, tmp_path):
    torch.manual_seed(0)
    base, x, A, B = Words(), torch.arange(7), torch.randn(2, 7), torch.randn(4, 2)
    prefix = "base_model.model.emb.lora_embedding_"
    save_file({f"{prefix}A": A, f"{prefix}B": B}, tmp_path / "adapter_model.safetensors")
    values = {**of_release("0.17"), "init_lora_weights": kind, "target_modules": ["emb"], "lora_dropout": 0.0}
    want = base(x) + (B @ A).T * 3
    folder = written(tmp_path, values | ({"peft_version": version} if version else {}))
    model = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(model(x), want)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(model.unload(), tmp_path / "again")(x), want)


def test_first_factors_that_a_file_of_the_other_library_does_not_hold_are_told(tmp_path):
    save_file(
        {
            "base_model.model.fc.lora_A.weight": torch.randn(2, 4),
            "base_model.model.fc.lora_B.weight": torch.randn(3, 2),
        },
        tmp_path / "adapter_model.safetensors",
    )
    values = {**of_release("0.18"), "init_lora_weights": "pissa_niter_4"}
    with pytest.warns(PeftWarning, match="pissa_niter_4' by another library"):
        PeftModel.from_pretrained(Net(), written(tmp_path, values))
