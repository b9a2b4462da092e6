"""Adaption prompts: the formula, and all that a model with them should still do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peft
from peft import AdaptionPromptConfig, PeftModel, get_peft_model

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
