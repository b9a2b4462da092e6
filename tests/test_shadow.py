"""Shadow: a small model beside the base, of which blocks take and which follows them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, ShadowConfig, get_peft_model, get_peft_model_state_dict

transformers = pytest.importorskip("transformers")

X = torch.arange(12).reshape(2, 6) + 3
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def base(kind: str = "LlamaForCausalLM", **more) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "vocab_size": 48, "max_position_embeddings": 64, **SPECIAL, **more}
    return getattr(transformers, kind)(transformers.LlamaConfig(**sizes)).eval()


def wrapped(**more) -> PeftModel:
    model = get_peft_model(base(), ShadowConfig(**{"task_type": "CAUSAL_LM", "r": 4, "shadow_alpha": 0.5, **more}))
    return randomised(model)


def randomised(model: PeftModel, seed: int = 1) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "shadow_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return model.eval()


def by_hand(model: PeftModel, *names: str) -> torch.Tensor:
    """The output by the definition: hooks around the blocks of a base model."""
    plain, tuner, state = base(), model.base_model, {}
    for name in names:
        backbone, projection = tuner.shadow_backbone[name], tuner.shadow_projection[name]
        own = backbone.embed_tokens or plain.get_input_embeddings()
        state[name] = projection(backbone(inputs_embeds=own(X)).last_hidden_state)

    def around(layer):
        def part(key, name):
            return getattr(layer, f"shadow_{key}")[name]

        def before(block, args):
            alphas = {n: model.peft_config[n].shadow_alpha for n in names}
            taken = [alphas[n] * part("up", n)(part("down", n)(args[0] - state[n])) for n in names]
            return (args[0] + sum(taken), *args[1:])

        def after(block, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            for n in names:
                g = torch.sigmoid(part("update_gate", n)(hidden))
                state[n] = (1 - g) * state[n] + g * part("update_transform", n)(hidden)

        return before, after

    for layer, block in zip(model.get_base_model().model.layers, plain.model.layers, strict=True):
        before, after = around(layer)
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    return plain(X).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "more", [{}, {"shadow_hidden_size": 8, "shadow_num_hidden_layers": 2}, {"share_embeddings": False}]
)
def test_the_output_is_the_definition(more):
    model = wrapped(**more)
    torch.testing.assert_close(model(X).logits, by_hand(model, "default"))
    assert not torch.allclose(model(X).logits, base()(X).logits, atol=1e-2)


@torch.no_grad()
def test_it_starts_at_the_base_model_and_leaves_it_alone():
    plain = base()
    model = get_peft_model(base(), ShadowConfig(task_type="CAUSAL_LM")).eval()
    assert torch.equal(model(X).logits, plain(X).logits)
    model = randomised(model)
    with model.disable_adapter():
        assert torch.equal(model(X).logits, plain(X).logits)
    for refused in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="depends on the input"):
            refused()
    back = model.unload()
    assert torch.equal(back(X).logits, plain(X).logits)
    assert back.state_dict().keys() == plain.state_dict().keys()
    assert not back._forward_pre_hooks and not back._forward_hooks


def test_the_shadows_own_loss_is_added():
    model = wrapped(auxiliary_loss_weight=0.25)
    out = model(X, labels=X)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), X[:, 1:].flatten())
    shadow = model.base_model.unload_shadow(copy=True)
    own = torch.nn.functional.cross_entropy(shadow(X).logits[:, :-1].flatten(0, 1), X[:, 1:].flatten())
    torch.testing.assert_close(out.shadow_loss, own.detach())
    torch.testing.assert_close(out.loss, plain + 0.25 * own)
    out.loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("shadow_" in n for n in trained)
    last = ("layers.1.shadow_update_transform", "layers.1.shadow_update_gate")  # nobody follows the last block
    assert all(p.grad.any() for n, p in trained.items() if not any(part in n for part in last))


def test_a_classifier_learns_from_the_shadow_too():
    model = get_peft_model(
        base("LlamaForSequenceClassification", num_labels=3), ShadowConfig(task_type="SEQ_CLS", shadow_dropout=0.0)
    )
    out = model(input_ids=X, attention_mask=torch.ones_like(X), labels=torch.tensor([0, 2]))
    assert torch.isfinite(out.loss) and out.shadow_loss > 0
    assert "default" in model.base_model.shadow_head
    out.loss.backward()
    assert model.base_model.shadow_head["default"].weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"shadow_hidden_size": 8}])
def test_what_is_saved_gives_the_same_output(tmp_path, more):
    model = wrapped(**more)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, adapter_name="again").eval()
    assert torch.equal(again(X).logits, model(X).logits)
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(again(X).logits, model(X).logits)


@torch.no_grad()
def test_caches_go_in_pairs():
    model = wrapped()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}):
        cached = model.generate(input_ids=X[:, :3], **options, **more)
        for other in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(cached, model.generate(input_ids=X[:, :3], **options, **more, **other))
    first = model(X[:, :4])
    rest = model(X[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, model(X).logits[:, 4:])
    with model.disable_adapter():
        alone = model(X[:, :4]).past_key_values
    with pytest.raises(ValueError, match="filled without the shadow"):
        model(X[:, 4:], past_key_values=alone)


@torch.no_grad()
def test_adapters_switch_mix_and_add_up():
    model = wrapped()
    one = model(X).logits
    model.add_adapter("other", ShadowConfig(task_type="CAUSAL_LM", r=2, shadow_hidden_size=8))
    randomised(model, 2)
    one = model(X).logits
    model.set_adapter("other")
    other = model(X).logits
    torch.testing.assert_close(other, by_hand(model, "other"))
    mixed = model(X, adapter_names=["other", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([other[0], one[1]]))
    mixed = model(X, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([base()(X).logits[0], one[1]]))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    together = model.generate(input_ids=X[:, :3], adapter_names=["other", "default"], **options)
    assert torch.equal(together[:1], model.generate(input_ids=X[:1, :3], **options))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(X).logits, by_hand(model, "default", "other"))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="was active and is deleted"):
        model.delete_adapter("other")
    with pytest.raises(NotImplementedError, match="cannot be summed up"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert model.active_adapters == ["default"] and not any(".other" in n for n, _ in model.named_parameters())
    assert torch.equal(model(X).logits, one)


def test_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = wrapped(shadow_dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(X, labels=X).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@torch.no_grad()
def test_copies_are_independent():
    model = wrapped()
    wanted = model(X).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X).logits, wanted)
        randomised(twin, 5)
        assert not torch.allclose(twin(X).logits, wanted)
    assert torch.equal(model(X).logits, wanted)


@torch.no_grad()
def test_other_methods_work_inside_the_blocks(tmp_path):
    model = wrapped()
    model.add_adapter("low", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "low"])
    wanted = model(X).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    again.load_adapter(tmp_path / "low", "low")
    again.base_model.set_adapter(["default", "low"])
    assert torch.equal(again(X).logits, wanted)
    model.set_adapter("low")
    alone = PeftModel.from_pretrained(base(), tmp_path / "low", adapter_name="low").eval()
    assert torch.equal(alone(X).logits, model(X).logits)
    with pytest.raises(ValueError, match="must be the model's first"):
        alone.load_adapter(tmp_path, "default")
    assert list(alone.peft_config) == ["low"]


def test_blocks_can_be_chosen_and_mistakes_are_told():
    model = get_peft_model(base(), ShadowConfig(task_type="CAUSAL_LM", layers_to_transform=[1]))
    assert model.targeted_module_names == ["model.layers.1"]
    with pytest.raises(ValueError, match="has its own sizes"):
        ShadowConfig(shadow_model="some/model", shadow_hidden_size=8)
    with pytest.raises(ValueError, match=r"3 cannot share the 2 key heads.*multiple of 2"):
        get_peft_model(base(num_key_value_heads=2), ShadowConfig(shadow_num_attention_heads=3))
    with pytest.raises(ValueError, match="no configuration that says"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), ShadowConfig(target_modules=["0"]))


def test_the_shadow_of_a_model_that_is_a_decoder_within_is_that_decoder():
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(**OPT, word_embed_proj_dim=16, **SPECIAL))
    model = get_peft_model(opt, ShadowConfig(task_type="CAUSAL_LM"))
    assert type(model.base_model.shadow_backbone["default"]).__name__ == "OPTDecoder"
    keys = get_peft_model_state_dict(model)
    assert "base_model.shadow_backbone.default.embed_positions.weight" in keys  # as files of the other library have it
    assert model(input_ids=X, labels=X).shadow_loss > 0


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 48}
OPT = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48}


@pytest.mark.parametrize(
    "kind, sizes, name",
    [
        ("GPT2", GPT2, "h.0.mlp.c_fc.weight"),
        ("OPT", {**OPT, "word_embed_proj_dim": 16}, "layers.0.fc1.weight"),
        ("Falcon", {**SIZES, "vocab_size": 48}, "h.0.mlp.dense_h_to_4h.weight"),
    ],
)
def test_sizes_reach_the_shadow_whatever_the_model_calls_them(kind, sizes, name):
    sizes = {key: value for key, value in sizes.items() if kind != "Falcon" or key != "intermediate_size"}
    plain = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes, **SPECIAL))
    config = ShadowConfig(task_type="CAUSAL_LM", shadow_hidden_size=8, shadow_intermediate_size=10)
    model = get_peft_model(plain, config)
    assert sorted(model.base_model.shadow_backbone["default"].get_parameter(name).shape) == [8, 10]
    assert model(input_ids=X, labels=X).shadow_loss > 0


def test_a_shadow_may_have_more_layers_than_the_model():
    sizes = {**SIZES, "num_key_value_heads": 1, "vocab_size": 48, "num_hidden_layers": 1, **SPECIAL}
    plain = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    model = get_peft_model(plain, ShadowConfig(task_type="CAUSAL_LM", shadow_num_hidden_layers=2))
    assert len(model.base_model.shadow_backbone["default"].layers) == 2
    assert model(input_ids=X, labels=X).shadow_loss > 0


def test_a_size_that_the_model_has_not_is_told():
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=48))
    with pytest.raises(ValueError, match="shadow_intermediate_size=10, but a BloomConfig has none of"):
        get_peft_model(bloom, ShadowConfig(task_type="CAUSAL_LM", shadow_intermediate_size=10))
