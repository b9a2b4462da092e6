"""HiRA, DEFT, PVeRA, Uni-LoRA and BEFT: what the formulas of the conformance tests do not see."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    DeftConfig,
    HiraConfig,
    PeftModel,
    PveraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    UniLoraConfig,
    get_peft_model,
)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


TARGETS = {"target_modules": ["0", "2"]}
X = torch.linspace(-1, 1, 18).view(3, 6)


def test_pvera_draws_in_training_and_is_its_mean_otherwise():
    model = get_peft_model(plain(), PveraConfig(r=3, init_weights=False, generator_seed=5, **TARGETS))
    again = get_peft_model(plain(), PveraConfig(r=3, init_weights=False, generator_seed=5, **TARGETS))
    again.load_state_dict(model.state_dict())
    first, second = model.train()(X), model(X)
    assert not torch.equal(first, second)
    assert torch.equal(again.train()(X), first)
    assert torch.equal(again(X), second)
    mean = torch.stack([model(X)[0, 0] for _ in range(4)])
    assert mean.unique().numel() == 4
    assert torch.equal(model.eval()(X), model(X))


def test_pvera_can_draw_outside_training():
    model = get_peft_model(plain(), PveraConfig(r=3, init_weights=False, sample_at_inference=True, **TARGETS)).eval()
    assert not torch.equal(model(X), model(X))


def test_dropout_of_deft_leaves_out_the_learnt_part_only():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8)), DeftConfig(r=3, deft_dropout=0.9999, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.deft_P["default"].normal_()
        layer.deft_R["default"].normal_()
    P, W, b = layer.deft_P["default"], layer.base_layer.weight, layer.base_layer.bias
    wanted = X @ (W - P @ P.relu().T @ W).T + b
    torch.testing.assert_close(model.train()(X), wanted)
    full = X @ (W + P @ (layer.deft_R["default"] - P.relu().T @ W)).T + b
    torch.testing.assert_close(model.eval()(X), full)


@pytest.mark.filterwarnings("ignore:.*is not the configuration that was saved")
def test_a_file_of_hira_whose_ranks_ignore_the_pattern_loads(tmp_path):
    """The other library gives rank r to every module."""
    model = get_peft_model(plain(), HiraConfig(r=4, init_weights=False, **TARGETS))
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"rank_pattern": {}', '"rank_pattern": {"2": 2}'))
    again = PeftModel.from_pretrained(plain(), tmp_path)
    assert torch.equal(again.eval()(X), model.eval()(X))
    assert again.base_model.model[2].r["default"] == 4
    config.write_text(
        config.read_text().replace('"rank_pattern": {"2": 2}', '"rank_pattern": {}').replace('"r": 4', '"r": 2')
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(plain(), tmp_path)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("low", [True, False])
def test_places_of_uni_lora_come_from_the_file_or_from_the_seed(tmp_path, saved, low):
    model = get_peft_model(plain(), UniLoraConfig(r=2, theta_d_length=5, save_indices=saved, **TARGETS)).eval()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.unilora_theta_d.default"]
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    assert len(tensors) == (9 if saved else 1)
    again = PeftModel.from_pretrained(plain(), tmp_path, low_cpu_mem_usage=low).eval()
    assert torch.equal(again(X), model(X))
    if saved:  # other places, such as another generator gives
        key = "base_model.model.0.unilora_indices_A"
        tensors[key] = (tensors[key] + 1) % 5
        save_file(tensors, path)
        assert not torch.equal(PeftModel.from_pretrained(plain(), tmp_path).eval()(X), model(X))


@pytest.mark.filterwarnings("ignore:save_projection=False")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "kind, field, fields, key",
    [
        (UniLoraConfig, "save_indices", {"r": 2, "theta_d_length": 5}, "unilora_indices_A"),
        (TinyLoraConfig, "save_projection", {"u": 4}, "tinylora_P"),
        (SupertuningConfig, "save_precomputed_indices", {"sparsity": 0.5}, "supertuning_indices"),
    ],
)
def test_each_adapter_of_a_layer_says_what_its_file_holds(kind, field, fields, key, first, tmp_path):
    model = get_peft_model(plain(), kind(**{field: first}, **fields, **TARGETS))
    model.add_adapter("other", kind(**{field: not first}, **fields, **TARGETS))
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    for folder, holds in ((tmp_path, first), (tmp_path / "other", not first)):
        assert any(key in name for name in load_file(folder / "adapter_model.safetensors")) is holds
    assert torch.equal(PeftModel.from_pretrained(plain(), tmp_path / "other").eval()(X), model.eval()(X))


def test_the_vector_of_uni_lora_is_dealt_out_evenly_and_only_as_a_whole():
    model = get_peft_model(plain(), UniLoraConfig(r=2, theta_d_length=5, **TARGETS))
    layers = (model.base_model.model[0], model.base_model.model[2])
    places = torch.cat([t["default"].flatten() for m in layers for t in (m.unilora_indices_A, m.unilora_indices_B)])
    counts = places.bincount(minlength=5)
    assert counts.sum() == 2 * (6 + 8 + 8 + 4)
    assert counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match=r"module_config.*sets r"):
        UniLoraConfig(module_config={"0": {"r": 3}})
