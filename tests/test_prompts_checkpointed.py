"""Keys and values under gradient checkpointing: the same outputs and gradients as without it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import peft
from peft import get_peft_model
from test_prompts import HEADS, MODELS, bert, config, llama, t5, tasks, text

pytest.importorskip("transformers")

KINDS = ["prefix", "prefix-projection", "cartridge"]
BASES = {**MODELS, **{kind: lambda kind=kind: bert(kind) for kind, _ in HEADS.values()}, "t5": t5}
TASKS = {**{kind: task for task, (kind, _) in HEADS.items()}, "t5": "SEQ_2_SEQ_LM"}
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


def made(name: str, base: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    task = TASKS.get(base, "CAUSAL_LM")
    if name == "cartridge":
        setting = peft.CartridgeConfig(task_type=task, num_virtual_tokens=4, **more)
    else:
        setting = config(name, task, **more)
    model = get_peft_model(BASES[base](), setting).train()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape)
    return model


def run(model: Any, base: str = "llama", **more: Any) -> Any:
    given = {**text(), **more}
    if base == "t5":
        given["labels"] = given["input_ids"][:, :4].contiguous()
    out = model(**given)
    return next(out[k] for k in ("logits", "start_logits", "last_hidden_state") if k in out)


def learnt(model: Any, *outputs: Any) -> list[Any]:
    """Gradients of the sums of squares, one backward pass for each output, the last first."""
    model.zero_grad()
    for out in reversed(outputs):
        out.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


def same(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@REENTRANT
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", KINDS)
def test_output_and_gradients_are_those_without_it(name: str, base: str, reentrant: bool) -> None:
    model = made(name, base)
    wanted = run(model, base)
    gradients = learnt(model, wanted)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = run(model, base)
    torch.testing.assert_close(found, wanted)
    same(learnt(model, found), gradients)


@REENTRANT
def test_forward_passes_may_wait_for_their_backward_passes(reentrant: bool) -> None:
    model, other = made("prefix"), {"input_ids": text()["input_ids"].flip(1)}
    gradients = learnt(model, run(model), run(model, **other))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    same(learnt(model, run(model), run(model, **other)), gradients)


def test_a_second_backward_pass_through_the_same_graph_gives_the_same() -> None:
    model = made("prefix-projection")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = run(model).square().sum()
    found = []
    for keep in (True, False):
        model.zero_grad()
        loss.backward(retain_graph=keep)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    same(*found)


@REENTRANT
@pytest.mark.parametrize("second", ["prefix", "prompt", "lora"])
def test_adapters_beside_learn_too(second: str, reentrant: bool) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = made("prefix")
    model.add_adapter("second", lora if second == "lora" else config(second))
    model.set_adapter(["default", "second"])
    gradients = learnt(model, run(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    same(learnt(model, run(model)), gradients)


def test_a_window_narrower_than_the_prefix_keeps_its_last_keys() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    setting = transformers.MistralConfig(**small, intermediate_size=24, num_key_value_heads=2, sliding_window=3)
    torch.manual_seed(0)
    model = get_peft_model(transformers.MistralForCausalLM(setting), config("prefix", num_virtual_tokens=5)).train()
    wanted = run(model)
    gradients = learnt(model, wanted)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(run(model), wanted)
    same(learnt(model, run(model)), gradients)


def test_copies_stand_by_themselves_and_unloading_takes_the_hooks_away() -> None:
    model = made("prefix")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run(model)
    twin = copy.deepcopy(model)
    twin.prompt_encoder["default"].embedding.weight.data.add_(1)
    assert not torch.equal(run(twin), run(model))
    same(learnt(twin, run(twin)), learnt(twin, run(twin)))
    base = model.unload()
    assert not any(m._forward_pre_hooks for m in base.modules() if hasattr(m, "layer_idx"))
    twin.eval()
    with torch.no_grad():
        assert run(twin).shape == (2, 5, 40)


def test_the_output_has_no_cache_that_lacks_the_text() -> None:
    model = made("prefix")
    model.gradient_checkpointing_enable()
    assert model(**text()).past_key_values is None


def test_generating_in_training_mode_is_refused() -> None:
    model = made("prefix")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.generate(**text(), max_new_tokens=2)
    assert len(model.eval().generate(**text(), max_new_tokens=2)) == 2


def test_a_model_whose_attention_takes_no_cache_by_name_is_refused() -> None:
    base = llama()
    for layer in base.model.layers:
        layer.self_attn.layer_idx = "0"
    model = get_peft_model(base, config("prefix")).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        run(model)


@pytest.mark.parametrize("name", ["prompt", "multitask"])
def test_tokens_in_front_need_none_of_this(name: str) -> None:
    model = made(name)
    model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, **tasks(name))
    assert model.prompts.survivor is None
