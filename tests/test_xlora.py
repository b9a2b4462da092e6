"""X-LoRA: the gate, the experts under it, and what becomes of both."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, PeftWarning, XLoraConfig, get_peft_model

transformers = pytest.importorskip("transformers")

X = torch.arange(12).reshape(2, 6) + 3
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def base(use_cache: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, vocab_size=48, max_position_embeddings=64, use_cache=use_cache, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Folders of two experts, of different ranks and targets."""
    folders = {}
    for name, r, targets in (("first", 4, ["q_proj", "v_proj"]), ("second", 2, ["q_proj", "v_proj", "embed_tokens"])):
        folders[name] = str(tmp_path_factory.mktemp(name))
        model = get_peft_model(base(), LoraConfig(r=r, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
        randomise(model, r)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PeftWarning)
            model.save_pretrained(folders[name], save_embedding_layers=False)
    return folders


def randomise(model: nn.Module, seed: int, of: str = "lora_") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if of in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)


def wrapped(experts, **more) -> PeftModel:
    fields = {
        "hidden_size": 16,
        "xlora_depth": 2,
        "xlora_size": 8,
        "layerwise_scalings": True,
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(base(), XLoraConfig(adapters=experts, **{**fields, **more}))
    randomise(model, 7, "classifier")
    return model.eval()


def update(layer: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """s B A x of one expert in one layer."""
    if "lora_embedding_A" in layer._modules and name in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        return layer.scaling[name] * (A.mT[x] @ B.mT)
    return layer.scaling[name] * (x @ layer.lora_A[name].weight.mT @ layer.lora_B[name].weight.mT)


def by_hand(model: PeftModel, experts, g: float = 1.0, keep=lambda c: c) -> torch.Tensor:
    """The output by the formula: hooks on the adapted layers of a base model add the scaled updates."""
    plain = base()
    hidden = plain(X, output_hidden_states=True).hidden_states[-1]
    first, _, _, last = model.base_model.internal_xlora_classifier.layers
    c = last(torch.relu(first(hidden))).unflatten(-1, (-1, 2)).softmax(-1)
    layers = [(n, m) for n, m in model.get_base_model().named_modules() if hasattr(m, "base_layer")]

    def add(layer, k):
        def hook(module, args, output):
            mine = keep(c[..., k, :])
            parts = [
                mine[..., i, None] * update(layer, n, args[0]) for i, n in enumerate(experts) if n in layer.adapters
            ]
            return output + g * sum(parts)

        return hook

    for k, (path, layer) in enumerate(layers):
        plain.get_submodule(path).register_forward_hook(add(layer, k))
    return plain(X).logits


@torch.no_grad()
def test_the_output_is_the_formula(experts):
    model = wrapped(experts, global_scaling_weight=1.5)
    torch.testing.assert_close(model(X).logits, by_hand(model, experts, 1.5))
    model.set_topk_lora(1)
    model.set_global_scaling_weight(1.0)
    largest = by_hand(model, experts, keep=lambda c: torch.where(c == c.max(-1, keepdim=True).values, c, 0))
    torch.testing.assert_close(model(X).logits, largest)
    model.set_topk_lora(0)
    torch.testing.assert_close(model(X).logits, base()(X).logits)


def test_only_the_gate_learns_unless_the_experts_are_to(experts):
    model = wrapped(experts)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("internal_xlora_classifier" in n for n in trained)
    model(X, labels=X).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    model = wrapped(experts, use_trainable_adapters=True)
    model(X, labels=X).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_checkpointing_gives_the_same_gradients(experts):
    found = []
    for checkpointing in (False, True):
        model = wrapped(experts, xlora_dropout_p=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        losses = [model(x, labels=x).loss for x in (X, X + 5)]
        sum(losses).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@torch.no_grad()
def test_the_base_is_never_touched(experts):
    plain = base()
    model = wrapped(experts)
    before = {n: p.clone() for n, p in plain.named_parameters()}
    model(X)
    with model.disable_adapter():
        assert torch.equal(model(X).logits, plain(X).logits)
    with pytest.raises(NotImplementedError, match="anew for each token"):
        model.merge_adapter()
    back = model.unload()
    assert torch.equal(back(X).logits, plain(X).logits)
    assert not back._forward_pre_hooks
    assert all(torch.equal(p, before[n]) for n, p in back.named_parameters())


@torch.no_grad()
def test_what_is_saved_gives_the_same_output(experts, tmp_path):
    model = wrapped(experts)
    wanted = model(X).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # targeted embeddings are saved with a word
        model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(X).logits, wanted)
    assert not any(p.requires_grad for p in again.parameters())
    expert = PeftModel.from_pretrained(base(), tmp_path / "first").eval()  # the experts are whole adapters
    again.set_adapter("first")
    torch.testing.assert_close(again(X).logits, expert(X).logits)


@torch.no_grad()
def test_trained_experts_come_back_with_the_gate(experts, tmp_path):
    model = wrapped(experts, use_trainable_adapters=True)
    randomise(model, 9)
    wanted = model(X).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # targeted embeddings are saved with a word
        model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path).eval()(X).logits, wanted)


@torch.no_grad()
def test_generation_reads_the_whole_text_each_time(experts):
    model = wrapped(experts)
    tokens = X[:, :3]
    for _ in range(3):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], -1)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for inputs in (X[:, :3], torch.ones(2, 1, dtype=torch.long)):
        model.generate(input_ids=inputs, **options)
    assert torch.equal(model.generate(input_ids=X[:, :3], **options), tokens)
    with pytest.raises(ValueError, match="without a cache"):
        model.get_base_model().generate(input_ids=X[:, :3], use_cache=True, **options)


@torch.no_grad()
def test_a_mixed_batch_is_separate_runs(experts):
    model = wrapped(experts)
    together = model(X, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(together[0], model(X[:1]).logits[0])
    torch.testing.assert_close(together[1], base()(X[1:]).logits[0])


@torch.no_grad()
def test_scalings_can_be_looked_at(experts):
    model = wrapped(experts)
    assert model.get_latest_scalings() is None
    model.enable_scalings_logging()
    for length in (6, 4, 6):
        model(X[:, :length])
    model.disable_scalings_logging()
    model(X)
    scalings = model.get_latest_scalings()
    assert scalings.shape == (2, 6, 5, 2)
    torch.testing.assert_close(scalings.sum(-1), torch.ones(2, 6, 5))
    log = model.get_scalings_log()
    assert [t.shape[1] for t in log] == [6, 4, 6]
    assert {n: numbers for n, (numbers, _) in model.get_bucketed_scalings_log().items()} == {6: [0, 2], 4: [1]}
    model.clear_scalings_log()
    assert model.get_scalings_log() == []


@torch.no_grad()
def test_the_gate_may_look_at_the_scaled_experts(experts):
    model = wrapped(experts)
    model(X)
    at_the_base = model.get_latest_scalings()
    model.set_scaling_pass_value(None)
    model(X)
    assert model.xlora_config.scaling_pass_value == 0.5
    assert not torch.allclose(model.get_latest_scalings(), at_the_base)


def test_copies_are_independent(experts):
    model = wrapped(experts)
    wanted = model(X).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(X).logits, wanted)
        randomise(twin, 11, "classifier")
        assert not torch.allclose(twin(X).logits, wanted)
    assert torch.equal(model(X).logits, wanted)


@torch.no_grad()
def test_merging_all_says_that_the_gate_is_left_out(experts):
    model = wrapped({"first": experts["first"]})
    expert = PeftModel.from_pretrained(base(), experts["first"]).eval()(X).logits
    with pytest.warns(PeftWarning, match="the output changes"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X).logits, expert)


def test_deleting_the_gate_leaves_its_experts(experts):
    model = wrapped(experts)
    with pytest.warns(UserWarning, match="was active and is deleted"):
        model.delete_adapter("default")
    assert model.base_model.gate is None
    assert sorted(model.peft_config) == ["first", "second"]
    model(X)


def test_mistakes_leave_the_model_alone(experts, tmp_path):
    plain = base()
    with pytest.raises(ValueError, match="use_cache = False"):
        get_peft_model(base(use_cache=True), XLoraConfig(hidden_size=16, adapters=experts))
    with pytest.raises(ValueError, match="have 16"):
        get_peft_model(plain, XLoraConfig(hidden_size=8, adapters=experts))
    with pytest.raises(ValueError, match="depth must be strictly positive"):
        XLoraConfig(hidden_size=16, adapters=experts, xlora_depth=0)
    dora = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    dora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no plain LoRA"):
        get_peft_model(plain, XLoraConfig(hidden_size=16, adapters={**experts, "dora": str(tmp_path)}))
    assert not any("lora_" in n or "base_layer" in n for n, _ in plain.named_parameters())
    model = wrapped(experts)
    with pytest.raises(ValueError, match="already, and can have one"):
        model.add_adapter("more", XLoraConfig(hidden_size=16, adapters={"third": experts["first"]}))
    assert set(model.peft_config) == {"default", "first", "second"}
