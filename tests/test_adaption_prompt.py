"""Adaption prompts: the formula, and all that a model with them should still do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peft
from peft import AdaptionPromptConfig, LoraConfig, PeftModel, get_peft_model

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **SMALL,
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, LLAMA),
    "gpt2": (
        transformers.GPT2Config,
        transformers.GPT2LMHeadModel,
        {**SMALL, "n_embd": 16, "n_inner": 24, "n_layer": 3, "n_head": 2, "n_positions": 64},
    ),
}
TOKENS = torch.tensor([[1, 5, 7, 9], [1, 4, 4, 3]])


def base(family: str = "llama", **changes: Any) -> Any:
    config, model, values = FAMILIES[family]
    torch.manual_seed(0)
    return model(config(**values, **changes)).eval()


def config(**fields: Any) -> AdaptionPromptConfig:
    return AdaptionPromptConfig(**{"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM", **fields})


def adapted(family: str = "llama", names: tuple[str, ...] = ("default",), **changes: Any) -> Any:
    model = get_peft_model(base(family, **changes), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    for i, name in enumerate(names):
        torch.manual_seed(10 + i)
        for parameter in model.adapter_parameters(name).values():
            parameter.data.normal_()
    return model.eval()


def attention(model: Any) -> Any:
    """The wrapped attention of the last layer."""
    root = model.get_base_model()
    return root.model.layers[-1].self_attn if hasattr(root, "model") else root.transformer.h[-1].attn


def turned(q: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions, written as complex products."""
    half = q.shape[-1] // 2
    angles = torch.arange(q.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    z = torch.complex(q[..., :half], q[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_adds_what_it_finds_in_the_prompt_behind_the_gate(family: str) -> None:
    model = adapted(family)
    layer = attention(model)
    seen: dict[str, Any] = {}
    hook = layer.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(x=args[0] if args else kwargs["hidden_states"], y=out[0]),
        with_kwargs=True,
    )
    inner = layer.model.register_forward_hook(lambda m, args, out: seen.update(base=out[0]))
    model(TOKENS)
    hook.remove()
    inner.remove()
    m, x, P, g = layer.model, seen["x"], layer.adaption_prompt[0], layer.adaption_gate
    if family == "gpt2":
        heads, groups = 2, 1
        W, b = m.c_attn.weight, m.c_attn.bias
        q, _, _ = (x @ W + b).split(16, -1)
        _, K, V = (P @ W + b).split(16, -1)
    else:
        heads, groups = 4, 2
        q, K, V = x @ m.q_proj.weight.T, P @ m.k_proj.weight.T, P @ m.v_proj.weight.T
    d = 16 // heads
    out = []
    for h in range(heads):
        qh = q[..., h * d : (h + 1) * d]
        qh = qh if family == "gpt2" else turned(qh)
        at = slice(h // groups * d, (h // groups + 1) * d)
        out.append(g * torch.softmax(qh @ K[:, at].T / d**0.5, -1) @ V[:, at])
    update = torch.cat(out, -1)
    update = update if family == "gpt2" else update @ m.o_proj.weight.T
    assert torch.allclose(seen["y"], seen["base"] + update, atol=1e-5)
    assert update.abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_at_the_base_model_and_trains_the_prompts_only(family: str) -> None:
    model = get_peft_model(base(family), config())
    assert torch.equal(model(TOKENS).logits, base(family)(TOKENS).logits)
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"adaption_prompt", "adaption_gate"}
    optimizer = torch.optim.SGD(list(model.adapter_parameters("default").values()), lr=1.0)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_implementation_gives_the_same(family: str) -> None:
    found = [adapted(family, attn_implementation=kind)(TOKENS).logits for kind in ("eager", "sdpa")]
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_with_a_cache_gives_the_same_tokens(family: str) -> None:
    model = adapted(family)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(TOKENS)
    cached = model.generate(input_ids=TOKENS, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=TOKENS, attention_mask=mask, use_cache=False, **options))
    with model.disable_adapter():
        plain = model.generate(input_ids=TOKENS, attention_mask=mask, **options)
    assert not torch.equal(cached, plain)
    assert torch.equal(plain, base(family).generate(input_ids=TOKENS, attention_mask=mask, **options))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad for p in model.adapter_parameters("default").values()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_several_adapters_are_switched_and_deleted() -> None:
    model = adapted(names=("one", "two"))
    alone = {n: model_of(n)(TOKENS).logits for n in ("one", "two")}
    for name in ("two", "one", "two"):
        model.set_adapter(name)
        assert torch.equal(model(TOKENS).logits, alone[name])
        assert all(p.requires_grad == (n == name) for n in alone for p in model.adapter_parameters(n).values())
    model.delete_adapter("one")
    assert torch.equal(model(TOKENS).logits, alone["two"])
    model.delete_adapter("two")
    assert torch.equal(model(TOKENS).logits, base()(TOKENS).logits)
    assert not any("adaption" in n for n, _ in model.named_parameters())


def model_of(name: str) -> Any:
    """The model of `test_several_adapters_are_switched_and_deleted` with one of its adapters alone."""
    model = adapted(names=("one", "two"))
    model.set_adapter(name)
    model.delete_adapter({"one": "two", "two": "one"}[name])
    return model


def test_adapters_may_have_other_layers_and_lengths() -> None:
    model = adapted()
    model.add_adapter("short", config(adapter_len=1, adapter_layers=1))
    expected = model(TOKENS).logits
    model.set_adapter("short")
    assert torch.equal(model(TOKENS).logits, base()(TOKENS).logits)
    model.set_adapter("default")
    assert torch.equal(model(TOKENS).logits, expected)


def test_each_sample_may_have_its_own_adapter() -> None:
    model = adapted(names=("one", "two"))
    alone = {n: model_of(n)(TOKENS).logits for n in ("one", "two")}
    mixed = model(TOKENS, adapter_names=["two", "one"]).logits
    assert torch.allclose(mixed, torch.stack([alone["two"][0], alone["one"][1]]), atol=1e-5)
    mixed = model(TOKENS, adapter_names=["__base__", "one"]).logits
    assert torch.allclose(mixed[0], base()(TOKENS).logits[0], atol=1e-5)


@pytest.mark.parametrize("meta", [False, True])
def test_a_saved_adapter_is_the_same(meta: bool, tmp_path: Path) -> None:
    model = adapted(names=("default", "two"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=meta)
    again.load_adapter(tmp_path / "two", "two", low_cpu_mem_usage=meta)
    for name in ("default", "two"):
        for m in (model, again):
            m.set_adapter(name)
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    state = peft.get_peft_model_state_dict(model, adapter_name="two")
    assert set(state) == {
        f"base_model.model.model.layers.{i}.self_attn.adaption_{t}" for i in (1, 2) for t in ("prompt", "gate")
    }


def test_the_base_is_left_as_it_was() -> None:
    plain, model = base(), adapted()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in peft.get_base_model_state_dict(model).items())
    free = model.unload()
    assert type(free.model.layers[-1].self_attn) is type(plain.model.layers[-1].self_attn)
    assert torch.equal(free(TOKENS).logits, plain(TOKENS).logits)


def test_copies_work_by_themselves() -> None:
    model = adapted(names=("one", "two"))
    twin = copy.deepcopy(model)
    twin.set_adapter("two")
    assert torch.equal(twin(TOKENS).logits, model_of("two")(TOKENS).logits)
    assert torch.equal(model(TOKENS).logits, model_of("one")(TOKENS).logits)


def test_half_precision_keeps_the_dtype_of_the_base() -> None:
    model = get_peft_model(base().to(torch.bfloat16), config())
    attention(model).adaption_gate.data.fill_(1)
    assert attention(model).adaption_prompt.dtype == torch.bfloat16
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_what_cannot_be_says_why() -> None:
    with pytest.raises(ValueError, match=r"adapter_layers=4.*3 modules named 'self_attn'"):
        get_peft_model(base(), config(adapter_layers=4))
    with pytest.raises(ValueError, match="usual name here is 'self_attn'"):
        get_peft_model(base(), config(target_modules="attn"))
    with pytest.raises(ValueError, match="adapter_len is not set"):
        get_peft_model(base(), config(adapter_len=None))
    with pytest.raises(ValueError, match="adapter_len"):
        config(adapter_len=0)
    with pytest.raises(ValueError, match="model types 'llama', 'mistral', 'gpt2'"):
        get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(2, 2)), AdaptionPromptConfig(None, None, None, adapter_len=1)
        )
    model = adapted()
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            call()
    with pytest.raises(ValueError, match="merged or summed up"):
        model.add_weighted_adapter(["default"], [1.0], "mix")
    with pytest.raises(TypeError, match="ADAPTION_PROMPT"):
        model.get_layer_status()
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.set_adapter("other")
    assert list(model.peft_config) == ["default"]


def test_a_failed_second_adapter_leaves_nothing_behind() -> None:
    model = adapted()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="adapter_layers=9"):
        model.add_adapter("two", config(adapter_layers=9))
    assert set(model.state_dict()) == names
    assert list(model.peft_config) == ["default"]


# ---- beside other adapters -------------------------------------------------------------------------------------------


def beside(*kinds: str, family: str = "llama") -> Any:
    """A model with adapters of these kinds, named after them; all are active, in this order."""
    targets = (
        {"target_modules": ["c_attn"], "fan_in_fan_out": True} if family == "gpt2" else {"target_modules": "q_proj"}
    )
    made = {
        "gated": lambda: config(),
        "short": lambda: config(adapter_len=1, adapter_layers=1),
        "low": lambda: LoraConfig(r=2, task_type="CAUSAL_LM", **targets),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }
    if family != "gpt2":
        targets["target_modules"] = ["q_proj", "k_proj", "o_proj"]
    model = get_peft_model(base(family), made[kinds[0]](), adapter_name=kinds[0])
    for kind in kinds[1:]:
        model.add_adapter(kind, made[kind]())
    for i, kind in enumerate(sorted(kinds)):
        torch.manual_seed(10 + i)
        for parameter in model.adapter_parameters(kind).values():
            parameter.data.normal_().mul_(0.3)
    model._tuner.set_adapter(list(kinds))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_terms_of_two_active_prompts_add_up(family: str) -> None:
    model, seen = beside("gated", "short", family=family), []
    layer = attention(model)
    hook = layer.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    inner = layer.model.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    x = torch.randn(2, 4, 16)
    given: dict[str, Any] = {}
    if family != "gpt2":
        turns = model.get_base_model().model.rotary_emb(x, torch.arange(4)[None])
        given = {"position_embeddings": turns, "attention_mask": None}
    sums = []
    for names in (["gated"], ["short"], ["gated", "short"]):
        model.base_model.set_adapter(names)
        layer(hidden_states=x, **given)
        sums.append(seen[-1] - seen[-2])
    hook.remove()
    inner.remove()
    assert all(s.abs().max() > 1e-5 for s in sums)
    torch.testing.assert_close(sums[2], sums[0] + sums[1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kinds", [("gated", "low"), ("low", "gated")])
def test_the_prompt_passes_through_adapted_projections(kinds: tuple[str, str], family: str) -> None:
    model = beside(*kinds, family=family)
    merged = copy.deepcopy(model)
    merged.merge_adapter(["low"])
    expected = merged(TOKENS).logits
    assert torch.allclose(model(TOKENS).logits, expected, atol=1e-5)
    model.set_adapter("gated")
    assert not torch.allclose(model(TOKENS).logits, expected, atol=1e-3)


@pytest.mark.parametrize("kinds", [("gated", "low"), ("low", "gated"), ("gated", "short"), ("prefix", "gated", "low")])
def test_every_adapter_has_its_own_file_and_any_may_come_first(kinds: tuple[str, ...], tmp_path: Path) -> None:
    model = beside(*kinds)
    wanted = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    for first in kinds:
        model.set_adapter(first)
        again = PeftModel.from_pretrained(base(), tmp_path / first, adapter_name=first)
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
        for other in kinds:
            if other != first:
                again.load_adapter(tmp_path / other, other)
        again._tuner.set_adapter(list(kinds))
        assert torch.allclose(again(TOKENS).logits, wanted, atol=1e-6)


@pytest.mark.parametrize("kinds", [("gated", "low"), ("low", "gated"), ("gated", "prefix")])
def test_all_of_them_learn_mix_in_a_batch_and_go(kinds: tuple[str, ...]) -> None:
    model, alone = beside(*kinds), {}
    gradients = []
    for reentrant in (None, False, True):
        model.train().zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad.clone() for n in kinds for p in model.adapter_parameters(n).values()])
    assert all(g.any() for g in gradients[0])
    for found in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, gradients[0], strict=True))
    model.eval()
    for kind in kinds:
        model.set_adapter(kind)
        alone[kind] = model(TOKENS).logits
    mixed = model(TOKENS, adapter_names=list(kinds)).logits
    assert torch.allclose(mixed, torch.stack([alone[k][i] for i, k in enumerate(kinds)]), atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base()(TOKENS).logits)
    model._tuner.set_adapter(list(kinds))
    model.delete_adapter(kinds[0])
    assert torch.equal(model(TOKENS).logits, alone[kinds[1]])
    free = model.unload()
    assert torch.equal(free(TOKENS).logits, base()(TOKENS).logits)
    assert set(free.state_dict()) == set(base().state_dict())


def test_targets_below_a_prompt_are_named_as_without_it() -> None:
    model = beside("gated")
    model.add_adapter("low", LoraConfig(r=2, target_modules=["layers.2.self_attn.v_proj"], layers_to_transform=None))
    assert model.base_model.targeted_module_names[-1] == "model.layers.2.self_attn.v_proj"
    keys = peft.get_peft_model_state_dict(model, adapter_name="low")
    assert set(keys) == {f"base_model.model.model.layers.2.self_attn.v_proj.lora_{f}.weight" for f in "AB"}
    model.add_adapter("all", LoraConfig(r=2, target_modules="all-linear"))
    assert "model.layers.2.self_attn.v_proj" in model.base_model.targeted_module_names
    for names in (None, ["gated"]):
        model._tuner.set_adapter(["gated", "low"])
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_adapter(names)


def test_whole_modules_and_new_heads_are_trained_and_saved(tmp_path: Path) -> None:
    model = get_peft_model(base(), config(modules_to_save=["lm_head"]))
    for parameter in model.adapter_parameters("default").values():
        parameter.data.add_(0.3)
    assert any("lm_head" in n and p.requires_grad for n, p in model.named_parameters())
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert again.peft_config["default"].modules_to_save == ["lm_head"]
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert "modules_to_save" not in config().to_dict()
    setting = transformers.LlamaConfig(**LLAMA, num_labels=3)
    heads = get_peft_model(transformers.LlamaForSequenceClassification(setting), config(task_type="SEQ_CLS"))
    assert any("score" in n and p.requires_grad for n, p in heads.named_parameters())
    with pytest.raises(ValueError, match="Only one adapter can be active for 'score'"):
        heads.add_adapter("two", config(task_type="SEQ_CLS"))
        heads.base_model.set_adapter(["default", "two"])
