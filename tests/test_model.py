"""PeftModel: creation, activation, running, heads, status and the Auto classes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import peft
from peft import (
    LoraConfig,
    LoraModel,
    LoraRuntimeConfig,
    PeftModel,
    PeftWarning,
    TrainableTokensConfig,
    functional,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.names import AdapterNameError


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def mlp():
    torch.manual_seed(0)
    return MLP().eval()


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["fc1", "fc2"], "init_lora_weights": False, **changes})


def tiny(kind, **extra):
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 32, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind in ("LlamaForCausalLM", "LlamaForSequenceClassification"):
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            **common,
            **extra,
        )
    elif kind.startswith("Bert"):
        config = transformers.BertConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            **common,
            **extra,
        )
    elif kind.startswith("T5"):
        config = transformers.T5Config(
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            **common,
            **extra,
        )
    else:
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **common, **extra)
    return getattr(transformers, kind)(config).eval()


IDS = torch.tensor([[1, 5, 7, 9], [2, 4, 6, 8]])


def logits(model, **inputs):
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def test_the_tree_and_the_names_are_the_usual_ones():
    model = get_peft_model(mlp(), lora())
    assert type(model) is PeftModel
    assert list(dict(model.named_children())) == ["base_model"]
    assert type(model.base_model).__name__ == "LoraModel"
    assert "base_model.model.fc1.lora_A.default.weight" in dict(model.named_parameters())
    assert "base_model.model.fc1.base_layer.weight" in dict(model.named_parameters())
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert model.active_peft_config is model.peft_config["default"]
    assert model.get_base_model() is model.base_model.model
    assert model.special_peft_forward_args == {"adapter_names", "alora_offsets", "task_ids"}
    assert model.base_model_torch_dtype is None or model.base_model_torch_dtype == torch.float32


def test_unknown_attributes_are_those_of_the_model():
    base = mlp()
    base.anything = 5
    model = get_peft_model(base, lora())
    assert model.anything == 5 and model.prefix == "lora_"
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it


def test_deepcopy_is_independent():
    model = get_peft_model(mlp(), lora())
    x = torch.randn(4, 6)
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), twin(x))
    with torch.no_grad():
        twin.base_model.model.fc1.lora_B["default"].weight.zero_()
    assert not torch.equal(model(x), twin(x))


def test_print_trainable_parameters(capsys):
    model = get_peft_model(mlp(), lora())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 2 * (6 + 8) + 2 * (8 + 8)
    assert total == trainable + sum(p.numel() for p in mlp().parameters())
    model.print_trainable_parameters()
    want = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
    assert capsys.readouterr().out == want


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("a.b", ValueError, "dot"),
        ("a.b", KeyError, "dot"),
        ("", ValueError, "empty"),
        (3, TypeError, "string"),
    ],
)
def test_impossible_adapter_names_are_refused(name, error, text):
    base = mlp()
    with pytest.raises(error, match=text):
        get_peft_model(base, lora(), adapter_name=name)
    assert type(base.fc1) is nn.Linear
    model = get_peft_model(base, lora())
    with pytest.raises(error, match=text):
        model.add_adapter(name, lora())
    assert str(AdapterNameError("plain text")) == "plain text"


def test_a_second_adapter_is_inactive_and_changes_no_flag():
    model = get_peft_model(mlp(), lora())
    x = torch.randn(4, 6)
    before, flags = model(x), {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter("other", lora(r=3))
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: after[n] for n in flags} == flags
    assert not any(v for n, v in after.items() if ".other." in n)
    assert model.active_adapters == ["default"]
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("other", lora())


def test_a_failed_add_changes_nothing():
    model = get_peft_model(mlp(), lora())
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError):
        model.add_adapter("bad", lora(target_modules=["nowhere"]))
    assert [n for n, _ in model.named_modules()] == before
    assert list(model.peft_config) == ["default"]
    model.add_adapter("bad", lora())


def test_set_adapter_takes_one_known_name():
    model = get_peft_model(mlp(), lora())
    model.add_adapter("other", lora())
    model.set_adapter("other")
    assert model.active_adapter == "other"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(model.adapter_parameters("other"))
    with pytest.raises(TypeError, match="one name"):
        model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Did you mean 'other'"):
        model.set_adapter("othr")
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("other")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(model.adapter_parameters("other"))


def test_disable_adapter_gives_the_base_and_restores_everything():
    base = mlp()
    x = torch.randn(4, 6)
    want = base(x)
    model = get_peft_model(base, lora(modules_to_save=["head"]))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    adapted = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), want)
        assert not model.has_active_enabled_adapter
        with model.disable_adapter():
            assert torch.equal(model(x), want)
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), adapted) and model.has_active_enabled_adapter
    with pytest.raises(RuntimeError, match="stop"), model.disable_adapter():
        raise RuntimeError("stop")
    assert torch.equal(model(x), adapted)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable_token_indices": [1, 3]},
        {"trainable_token_indices": {"embed_tokens": [1, 3]}, "modules_to_save": ["norm"]},
        {"trainable_token_indices": [1], "ensure_weight_tying": True},
        {"target_modules": ["lm_head"], "trainable_token_indices": [1]},
    ],
    ids=str,
)
def test_trained_tokens_are_back_after_disable(changes):
    base = tiny("LlamaForCausalLM", tie_word_embeddings="ensure_weight_tying" in changes)
    want = logits(base)
    model = get_peft_model(base, lora(**{"target_modules": ["q_proj"], **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "delta" in name or "modules_to_save" in name:
                p.add_(1)
    adapted = logits(model)
    for again in (False, True):
        with model.disable_adapter():
            assert torch.equal(logits(model), want)
            if again:
                with model.disable_adapter():
                    assert torch.equal(logits(model), want)
                assert torch.equal(logits(model), want) and model.get_model_status().enabled is False
        assert torch.equal(logits(model), adapted) and model.get_model_status().enabled is True


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["q_proj"], trainable_token_indices=[1, 3]),
        lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
        TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 3]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_tensors_of_tied_layers_are_trainable_again_after_enabling(config):
    model = get_peft_model(tiny("LlamaForCausalLM", tie_word_embeddings=True), copy.deepcopy(config))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.base_model.disable_adapter_layers()
    assert not any(p.requires_grad for p in model.parameters())
    model.base_model.enable_adapter_layers()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_what_is_disabled_is_unloaded_as_the_base():
    x, base = torch.randn(4, 6), mlp()
    want = base(x)
    model = get_peft_model(base, lora(modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    model.base_model.disable_adapter_layers()
    assert torch.equal(model.unload()(x), want)


def test_an_adapter_for_inference_stays_frozen_through_disable():
    model = get_peft_model(mlp(), lora(inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())


def test_deleting_the_last_adapter_leaves_the_base():
    base = mlp()
    x = torch.randn(4, 6)
    want = base(x)
    model = get_peft_model(base, lora())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert model.active_adapters == [] and model.active_adapter is None
    assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match="No adapter is active"):
        _ = model.active_peft_config
    with pytest.raises(ValueError, match="no adapter"):
        model.delete_adapter("default")
    model.add_adapter("new", lora())
    model.set_adapter("new")
    assert not torch.equal(model(x), want)


def test_mixed_batches_take_each_sample_to_its_adapter():
    model = get_peft_model(mlp(), lora())
    model.add_adapter("other", lora(r=3))
    x = torch.randn(4, 6)
    model.eval()
    separate = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        separate[name] = model(x)
    with model.disable_adapter():
        separate["__base__"] = model(x)
    names = ["other", "__base__", "default", "other"]
    got = model(x, adapter_names=names)
    want = torch.stack([separate[n][i] for i, n in enumerate(names)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # rows are computed in other batch sizes
    torch.testing.assert_close(model(x), separate["other"])


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ("default", TypeError, "list"),
        (["default"], ValueError, "1 entries.*4 samples"),
        (["default", "defalt", "default", "default"], ValueError, "Did you mean 'default'"),
    ],
)
def test_wrong_adapter_names_are_explained(names, error, text):
    model = get_peft_model(mlp(), lora()).eval()
    with pytest.raises(error, match=text):
        model(torch.randn(4, 6), adapter_names=names)
    assert model.base_model.call.names is None
    model(torch.randn(4, 6))


def test_adapter_names_hold_in_training_and_need_no_merge():
    model, x = get_peft_model(mlp(), lora(init_lora_weights=False)).train(), torch.randn(1, 6)
    torch.testing.assert_close(model(x, adapter_names=["default"]), model(x))
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(torch.randn(1, 6), adapter_names=["default"])


def test_status_of_layers_and_model():
    model = get_peft_model(mlp(), lora(modules_to_save=["head"]))
    layers = get_layer_status(model)
    assert [s.name for s in layers] == ["model.fc1", "model.fc2", "model.head"]
    assert [s.module_type for s in layers] == ["lora.Linear", "lora.Linear", "ModulesToSaveWrapper"]
    first = layers[0]
    assert first.enabled and first.active_adapters == ["default"] and first.merged_adapters == []
    assert first.requires_grad == {"default": True} and first.devices == {"default": ["cpu"]}
    assert first.available_adapters == ["default"] and first.quantization_backend is None
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("MLP", "LoraModel")
    assert status.peft_types == {"default": "LORA"} and status.num_adapter_layers == 3
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []


@pytest.mark.parametrize(
    "config",
    [
        peft.UniLoraConfig(target_modules=["0", "1"], r=2, theta_d_length=16),
        peft.TinyLoraConfig(target_modules=["0", "1"], r=2),
    ],
)
def test_status_of_layers_that_share_all_they_train(config):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), config)
    for status in (model.get_model_status(), *model.get_layer_status()):
        assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
    model.set_requires_grad("default", False)
    assert model.get_model_status().requires_grad == {"default": False}


def test_status_shows_irregularities():
    model = get_peft_model(mlp(), lora())
    model.add_adapter("other", lora(target_modules=["fc1"]))
    model.set_adapter("other")
    status = model.get_model_status()
    assert status.active_adapters == ["other"] and status.available_adapters == ["default", "other"]
    model.base_model.model.fc1.merge(adapter_names=["default"])
    assert model.get_model_status().merged_adapters == "irregular"
    model.base_model.model.fc1.unmerge()
    model.base_model.model.fc1.lora_A["default"].weight.requires_grad_(True)
    assert model.get_model_status().requires_grad["default"] == "irregular"
    model.base_model.model.fc1.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"


def test_status_of_a_plain_model_with_injected_layers():
    base = mlp()
    with pytest.raises(ValueError, match="No adapter layers"):
        get_layer_status(base)
    inject_adapter_in_model(lora(), base)
    assert [s.name for s in get_layer_status(base)] == ["fc1", "fc2"]
    status = get_model_status(nn.ModuleDict({"inner": base}))
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("other", "None", {})


def test_injection_changes_the_model_itself():
    base = mlp()
    assert inject_adapter_in_model(lora(), base) is base
    assert list(base.peft_config) == ["default"]
    assert "fc1.lora_A.default.weight" in dict(base.named_parameters())
    inject_adapter_in_model(lora(), base, "second")
    assert list(base.peft_config) == ["default", "second"]


@pytest.mark.parametrize("make", [lambda c, m: inject_adapter_in_model(c, m), lambda c, m: LoraModel(m, c, "default")])
@pytest.mark.parametrize("dora", [False, True])
def test_an_injected_adapter_has_the_dtype_of_the_weights_until_it_is_cast(make, dora):
    model = make(lora(use_dora=dora), mlp().bfloat16()).eval()
    x = torch.randn(4, 6).bfloat16()
    own = [p for n, p in model.named_parameters() if "lora_" in n]
    assert {p.dtype for p in own} == {torch.bfloat16}
    with torch.no_grad():
        before = model(x)
        functional.cast_adapter_dtype(model, "default")
        assert {p.dtype for p in own} == {torch.float32}
        torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.05)


def test_a_value_of_the_target_that_is_none_is_one():
    model = get_peft_model(nn.Sequential(nn.Embedding(4, 3)), lora(target_modules=["0"]))
    layer = model.base_model.model[0]
    assert layer.max_norm is None and layer.padding_idx is None and not hasattr(layer, "max_norms")


def test_the_origin_is_noted_and_changes_are_warned_of():
    base = mlp()
    base.name_or_path = "here"
    model = get_peft_model(base, lora(), revision="r1")
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("here", "r1")
    with pytest.warns(UserWarning, match="'elsewhere'.*'here'"):
        get_peft_model(_named(mlp(), "here"), lora(base_model_name_or_path="elsewhere"))
    with pytest.warns(UserWarning, match="revision"):
        get_peft_model(mlp(), lora(revision="a"), revision="b")


def _named(model, name):
    model.name_or_path = name
    return model


def test_a_second_wrap_and_confusing_names_are_warned_of():
    base = mlp()
    get_peft_model(base, lora())
    with pytest.warns(UserWarning, match="adapter layers already"):
        get_peft_model(base, lora(), adapter_name="more")
    with pytest.warns(UserWarning, match="prefix"):
        get_peft_model(mlp(), lora(), adapter_name="lora")


HEADS = {
    "LlamaForCausalLM": ("CAUSAL_LM", "PeftModelForCausalLM", None),
    "T5ForConditionalGeneration": ("SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM", None),
    "BertForSequenceClassification": (
        "SEQ_CLS",
        "PeftModelForSequenceClassification",
        ["classifier", "score"],
    ),
    "BertForTokenClassification": ("TOKEN_CLS", "PeftModelForTokenClassification", ["classifier", "score"]),
    "BertForQuestionAnswering": ("QUESTION_ANS", "PeftModelForQuestionAnswering", ["qa_outputs"]),
    "BertModel": ("FEATURE_EXTRACTION", "PeftModelForFeatureExtraction", None),
}


@pytest.mark.parametrize("kind", HEADS)
def test_task_classes_train_their_heads_even_beside_all_linear(kind):
    task, name, heads = HEADS[kind]
    model = get_peft_model(tiny(kind), LoraConfig(r=2, task_type=task, target_modules="all-linear"))
    assert type(model).__name__ == name
    assert model.peft_config["default"].modules_to_save == heads
    if heads:
        head = next(h for h in heads if hasattr(model.get_base_model(), h))
        assert type(getattr(model.get_base_model(), head)).__name__ == "ModulesToSaveWrapper"
        config = LoraConfig(r=2, task_type=task, target_modules="all-linear")
        model.add_adapter("second", config)
        assert config.modules_to_save == heads
    extra = {"decoder_input_ids": IDS} if task == "SEQ_2_SEQ_LM" else {}
    out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **extra)
    assert torch.isfinite(out[0]).all()


def test_question_answering_hands_token_types_on():
    base = tiny("BertForQuestionAnswering")
    types = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    with torch.no_grad():
        want = base(input_ids=IDS, token_type_ids=types).start_logits
    model = get_peft_model(base, LoraConfig(r=2, task_type="QUESTION_ANS")).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, token_type_ids=types).start_logits, want)
        out = model(input_ids=IDS, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([2, 3]))
    assert out.loss.isfinite()


def test_generation_needs_a_model_that_generates():
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        get_peft_model(mlp(), lora(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_an_adapter_per_sample(beams):
    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny("LlamaForCausalLM"), config).eval()
    model.add_adapter("other", LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    want = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        want[name] = model.generate(input_ids=IDS, **options)
    with model.disable_adapter():
        base = model.generate(input_ids=IDS, **options)
    got = model.generate(input_ids=IDS, adapter_names=["default", "other"], **options)
    assert got[0].tolist() == want["default"][0].tolist() and got[1].tolist() == want["other"][1].tolist()
    mixed = model.generate(input_ids=IDS, adapter_names=["__base__", "other"], **options)
    assert mixed[0].tolist() == base[0].tolist()
    assert model.base_model.call.names is None and model.base_model.call.beams == 1


def test_checkpointing_a_model_with_nothing_to_train_is_told(tmp_path):
    get_peft_model(tiny("LlamaForCausalLM"), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("LlamaForCausalLM", use_cache=False), tmp_path)
    with pytest.warns(PeftWarning, match="is_trainable=True"):  # its loss would have gradients, of the inputs alone
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradients_flow_through_checkpointed_layers(reentrant, when):
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    base = tiny("LlamaForCausalLM", use_cache=False)
    if when == "before":
        base.gradient_checkpointing_enable(**options)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    plain = copy.deepcopy(model)
    if when == "after":
        model.gradient_checkpointing_enable(**options)
    else:
        plain.gradient_checkpointing_disable()
    for m in (model, plain):
        m.train()
        m(input_ids=IDS, labels=IDS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("stated", [True, False])
def test_the_stored_layout_is_read_from_the_layer_and_the_field_follows_with_a_warning(stated):
    transformers = pytest.importorskip("transformers")
    layer = nn.Linear(4, 6) if stated else transformers.pytorch_utils.Conv1D(6, 4)
    config = LoraConfig(target_modules=["0"], fan_in_fan_out=stated)
    with pytest.warns(PeftWarning, match=f"fan_in_fan_out is set to {stated} but the target module is"):
        model = get_peft_model(nn.Sequential(layer), config)
    assert model.peft_config["default"].fan_in_fan_out is not stated
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(nn.Sequential(copy.deepcopy(layer)), LoraConfig(target_modules=["0"], fan_in_fan_out=not stated))


def test_tied_adapters_leave_tied_weights_tied_after_the_merge():
    base = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    config = lora(target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(base, config).eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), expected)


def test_an_adapter_of_one_tied_weight_unties_it_in_the_merge_and_in_the_configuration():
    base = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="is shared by 'lm_head'"):
        model = get_peft_model(base, lora(target_modules=["embed_tokens"]))
    expected = logits(model.eval())
    with pytest.warns(PeftWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), expected)


def test_an_option_without_effect_says_so(tmp_path):
    runtime = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    with pytest.warns(PeftWarning, match="ephemeral_gpu_offload=True has no effect"):
        model = get_peft_model(mlp(), lora(runtime_config=runtime))
    model.save_pretrained(tmp_path)
    with pytest.warns(PeftWarning, match="ephemeral_gpu_offload=True has no effect"):
        PeftModel.from_pretrained(mlp(), tmp_path, ephemeral_gpu_offload=True)


def test_methods_of_later_releases_are_refused_before_any_change():
    base = mlp()
    with pytest.raises(NotImplementedError, match="cannot carry out use_qalora"):
        get_peft_model(base, lora(use_qalora=True))
    assert type(base.fc1) is nn.Linear


def test_dict_configurations():
    from peft import get_peft_config

    config = get_peft_config({"peft_type": "LORA", "r": 3, "target_modules": ["fc1"]})
    assert type(config) is LoraConfig and config.r == 3


def test_auto_classes_find_base_and_adapter(tmp_path):
    from peft import AutoPeftModel, AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    base = tiny("LlamaForCausalLM")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="Use AutoPeftModelForCausalLM"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Use AutoPeftModelForCausalLM"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(EnvironmentError):
        AutoPeftModel()


def test_auto_model_imports_only_from_allowed_packages(tmp_path):
    from peft import AutoPeftModel

    base = tiny("LlamaForCausalLM")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="not in an allowed package"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["diffusers"])
    get_peft_model(_named(mlp(), str(tmp_path / "base")), lora()).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="not in an allowed package"):
        AutoPeftModel.from_pretrained(tmp_path / "own")


@pytest.mark.parametrize("name", ["half", "keys", "type", "training", "parameters", "items", "forward"])
def test_a_name_that_torchs_containers_have_themselves_is_refused_before_anything_changes(name):
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    before = [n for n, _ in net.named_modules()]
    with pytest.raises(ValueError, match=f"'{name}' is an attribute of the torch modules"):
        get_peft_model(net, LoraConfig(target_modules=["0", "1"]), adapter_name=name)
    assert [n for n, _ in net.named_modules()] == before
