"""What plans of several machines read of an adapted model: names and attributes, in one process."""

from __future__ import annotations

import importlib
import types
from typing import Any

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import fsdp_auto_wrap_policy

from .tiny import IDS, TARGETS, llama, logits, moved

transformers = pytest.importorskip("transformers", "4.57")


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


def both() -> list[Any]:
    """A Llama within a PeftModel, and one that transformers adapted itself."""
    bare = llama()
    bare.add_adapter(config())
    return [get_peft_model(llama(), config()), bare]


@pytest.mark.parametrize("way", [0, 1], ids=["PeftModel", "bare"])
def test_the_plan_of_tensor_parallelism_is_the_base_model_s(way):
    model, plain = both()[way], llama()
    for name in ("_tp_plan", "tp_plan", "_pp_plan", "pp_plan", "supports_tp_plan", "_tp_size", "tp_size"):
        assert getattr(model, name) == getattr(plain, name), name
    assert model.tp_plan["model.layers.*.self_attn.q_proj"] == "colwise"
    assert model.tp_plan["model.layers.*.mlp.down_proj"] == "rowwise"
    assert model.config.base_model_tp_plan == plain.config.base_model_tp_plan


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="plans begin at the inner model in transformers 4"
)
def test_every_entry_of_a_plan_still_names_a_module():
    bare, plan = both()[1], llama().tp_plan
    paths = {name.replace(".0.", ".*.").replace(".1.", ".*.") for name, _ in bare.named_modules()}
    assert set(plan) <= paths
    adapted = {name.replace(".0.", ".*.") for name, m in bare.named_modules() if isinstance(m, BaseTunerLayer)}
    assert any(name in plan for name in adapted)


def test_a_model_that_was_not_split_loads_adapters_as_usual(tmp_path):
    model = moved(get_peft_model(llama(), config()))
    model.save_pretrained(tmp_path)
    for size in (None, 1):
        there = llama()
        there._tp_size = size
        there.load_adapter(str(tmp_path))
        assert torch.equal(logits(there), logits(model))


@pytest.mark.parametrize(
    "own",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}],
    ids=str,
)
def test_every_trainable_parameter_has_a_gradient(own):
    """What data parallelism waits for: a parameter without one would block it."""
    model = get_peft_model(llama(attention_bias=True), config(**own)).train()
    model.add_adapter("other", config(**own))
    for name in ("default", "other"):
        model.set_adapter(name)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not lacking


# ---- FSDP ----------------------------------------------------------------------------------------------------------


def wrapped(policy: Any, model: nn.Module) -> set[str]:
    """The names of the modules that a policy puts into units of their own."""
    return {name for name, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)}


def test_the_policy_wraps_layers_and_trainable_leaves(monkeypatch):
    model = get_peft_model(llama(), config())
    found = wrapped(fsdp_auto_wrap_policy(model), model)
    leaves = {name for name, m in model.named_modules() if name.endswith((".lora_A.default", ".lora_B.default"))}
    assert found == leaves | {f"base_model.model.model.layers.{n}" for n in range(2)}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    found = wrapped(fsdp_auto_wrap_policy(model), model)
    assert found == leaves | {f"base_model.model.model.layers.{n}.mlp" for n in range(2)}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Nothing")
    with pytest.raises(TypeError, match="Nothing"):
        fsdp_auto_wrap_policy(model)


def test_transformers_puts_the_policy_into_its_plugin():
    home = "trainer_utils" if transformers.__version__.startswith("4.") else "integrations.fsdp"
    update = getattr(importlib.import_module(f"transformers.{home}"), "update_fsdp_plugin_peft", None)
    if update is None:
        pytest.skip("this transformers does it inside its Trainer")
    model = get_peft_model(llama(), config())
    plugin = types.SimpleNamespace(auto_wrap_policy=None)
    update(model, types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin)))
    assert "base_model.model.model.layers.1" in wrapped(plugin.auto_wrap_policy, model)


def test_transformers_asks_accelerate_for_the_adapter_alone():
    if transformers.__version__.startswith("4."):
        from transformers.trainer import _get_fsdp_ckpt_kwargs as asked
    else:
        from transformers.distributed.fsdp import get_fsdp_ckpt_kwargs as asked
    assert asked() == {"adapter_only": True}
    model = get_peft_model(llama(), config())
    assert isinstance(model, PeftModel) and isinstance(model.active_adapter, str)
    assert model.active_peft_config is model.peft_config["default"]
