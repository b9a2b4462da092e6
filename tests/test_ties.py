"""Modules that stand at several places of a model, and modules that share one weight: adapted, merged, saved."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peft
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    merge_checkpoint,
    set_peft_model_state_dict,
)
from peft.core.layer import tuner_layers
from peft.errors import PeftWarning
from peft.tuners.lora import BdLoraConfig, KasaConfig, LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.hotswap import hotswap_adapter_from_state_dict

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

IDS = torch.tensor([[3, 4, 5, 6]])


def twice() -> nn.Sequential:
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.again = self.q

    def forward(self, x):
        return self.norm(self.again(torch.relu(self.q(x))))


def blocks() -> nn.ModuleDict:
    """One block used twice, whose own layer has two names."""
    block = Block()
    return nn.ModuleDict({"body": nn.ModuleDict({"layers": nn.Sequential(block, block)}), "head": nn.Linear(8, 3)})


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "init_lora_weights": False, **changes})


def quiet(model: nn.Module, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of shared weights
        return get_peft_model(model, config).eval()


# ---- one module at several places ----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["0"], ["2"], ["0", "2"], "2", "all-linear"])
def test_a_module_at_two_places_is_adapted_at_both_under_either_name(targets):
    base, x = twice(), torch.randn(3, 8)
    layer = base[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, lora(target_modules=targets)).eval()
    assert base[0] is base[2] is not layer
    assert sorted(get_peft_model_state_dict(model)) == [f"base_model.model.0.lora_{k}.weight" for k in "AB"]
    W = layer.weight + base[0].get_delta_weight("default")
    expected = (x @ W.T + layer.bias).relu() @ W.T + layer.bias
    torch.testing.assert_close(model(x), expected)
    merged = model.merge_and_unload()
    assert merged[0] is merged[2] is layer
    torch.testing.assert_close(merged(x), expected)


def test_unloading_gives_back_the_module_at_every_place():
    base = twice()
    layer, names = base[0], [n for n, _ in base.named_modules(remove_duplicate=False)]
    plain = get_peft_model(base, lora(target_modules=["2"])).unload()
    assert plain[0] is plain[2] is layer
    assert [n for n, _ in plain.named_modules(remove_duplicate=False)] == names


def test_a_failed_wrap_gives_back_the_module_at_every_place():
    base = nn.Sequential(*twice(), nn.Linear(8, 2), nn.Conv1d(8, 8, 1))
    layer = base[0]
    config = lora(target_modules=["0", "4"], rank_pattern={"4": 999}, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="999"):
        get_peft_model(base, config)
    assert base[0] is base[2] is layer


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["layers.1.norm"]}, {"layers_to_transform": [1]}])
def test_a_block_used_twice_is_adapted_under_the_name_of_its_second_place(changes):
    base = blocks()
    block = base["body"]["layers"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, lora(target_modules=["again"], **changes))
    assert block.q is block.again
    assert block.q.get_base_layer().in_features == 8
    assert {path for path, _ in tuner_layers(base)} == {"body.layers.0.q"} | (
        {"body.layers.0.norm"} if "modules_to_save" in changes else set()
    )
    assert not any(".1." in key for key in get_peft_model_state_dict(model))


def test_excluding_one_name_of_a_module_excludes_it():
    model = get_peft_model(blocks(), lora(target_modules=["q", "head"], exclude_modules=["layers.1.again"]))
    assert [path for path, _ in tuner_layers(model.base_model.model)] == ["head"]


def test_a_second_adapter_joins_the_first_at_every_place():
    base, x = twice(), torch.randn(3, 8)
    model = get_peft_model(base, lora(target_modules=["0"])).eval()
    first = model(x)
    model.add_adapter("b", lora(target_modules=["2"]))
    assert base[0] is base[2]
    model.set_adapter("b")
    assert not torch.equal(model(x), first)
    model.set_adapter("default")
    model.delete_adapter("b")
    torch.testing.assert_close(model(x), first)


# ---- models whose embedding is tied --------------------------------------------------------------------------------


def t5() -> Any:
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def bart() -> Any:
    sides = {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in (("layers", 1), ("attention_heads", 2))}
    sizes = {"vocab_size": 32, "d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, **sides}
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = transformers.BartConfig(**sizes, **tokens, max_position_embeddings=32, scale_embedding=True)
    return transformers.BartForConditionalGeneration(config)


def resized_bart() -> Any:
    """Resizing makes one module of all embeddings."""
    model = bart()
    model.resize_token_embeddings(40)
    assert model.model.encoder.embed_tokens is model.model.shared
    return model


def llama() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    )


def prepared(make: Any) -> Any:
    """The model with weights so large that each of them shows in the output."""
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    return model


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def moved(model: PeftModel) -> PeftModel:
    """The adapted model with its trained copies changed."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora" not in name:
                p.add_(torch.randn_like(p) * 0.3)
    return model


UNTIED = [
    (t5, {"target_modules": ["q", "shared"]}),
    (t5, {"target_modules": ["encoder.embed_tokens"]}),
    (t5, {"target_modules": ["q"], "modules_to_save": ["shared"]}),
    (t5, {"target_modules": ["lm_head"]}),
    (bart, {"target_modules": ["q_proj", "shared"]}),
    (bart, {"target_modules": ["decoder.embed_tokens"]}),
    (bart, {"target_modules": ["q_proj"], "modules_to_save": ["shared"]}),
    (bart, {"target_modules": ["lm_head"]}),
    (resized_bart, {"target_modules": ["lm_head"]}),
    (resized_bart, {"target_modules": ["encoder.embed_tokens"]}),
    (llama, {"target_modules": ["embed_tokens"]}),
    (llama, {"target_modules": ["lm_head"]}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
]
TIED = [
    (t5, {"target_modules": ["q", "shared"]}),
    (t5, {"target_modules": ["q"], "modules_to_save": ["shared"]}),
    (t5, {"target_modules": ["q", "lm_head"]}),
    (bart, {"target_modules": ["q_proj", "shared"]}),
    (bart, {"target_modules": ["q_proj"], "modules_to_save": ["shared"]}),
    (resized_bart, {"target_modules": ["shared"]}),
    (llama, {"target_modules": ["lm_head"]}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
]


def case(row: Any) -> str:
    make, changes = row
    return f"{make.__name__}-{'-'.join(changes['target_modules'])}-{'-'.join(changes.get('modules_to_save', ()))}"


@pytest.mark.parametrize("row", UNTIED, ids=case)
def test_a_merged_model_whose_tied_weights_now_differ_loads_as_it_was_saved(row, tmp_path):
    make, changes = row
    model = moved(quiet(prepared(make), lora(**changes)))
    expected = logits(model)
    with pytest.warns(PeftWarning, match="no longer tied in the returned model"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(merged))
    assert make is t5 or not merged.config.tie_word_embeddings


@pytest.mark.parametrize("row", TIED, ids=case)
def test_tied_modules_are_adapted_alike_and_stay_tied(row, tmp_path):
    make, changes = row
    config = lora(**changes, ensure_weight_tying=True)
    model = moved(quiet(prepared(make), config))
    base = model.get_base_model()
    before, expected = logits(prepared_again(make)), logits(model)
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    for meta in (False, True):
        again = PeftModel.from_pretrained(prepared_again(make), tmp_path / "adapter", low_cpu_mem_usage=meta).eval()
        torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        merged = model.merge_and_unload()
    assert embedding is not merged.get_input_embeddings()
    assert head is not merged.get_output_embeddings()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path / "merged").eval()), logits(merged))


def prepared_again(make: Any) -> Any:
    torch.manual_seed(0)
    return prepared(make)


@pytest.mark.parametrize("make", [t5, bart])
def test_training_keeps_tied_adapters_the_same(make):
    changes = {"target_modules": ["shared"], "init_lora_weights": True}
    model = quiet(prepared(make), lora(**changes, ensure_weight_tying=True)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    deltas = [m.get_delta_weight("default") for _, m in tuner_layers(model.base_model.model)]
    assert len(deltas) == 4
    assert deltas[0].abs().sum() > 0
    for delta in deltas[1:]:
        torch.testing.assert_close(delta, deltas[0])


def test_what_mica_keeps_stays_as_it_is_in_every_tied_layer():
    changes = {"target_modules": ["embed_tokens"], "init_lora_weights": "mica", "ensure_weight_tying": True}
    planned = peft.plan(llama(), lora(**changes))
    model = quiet(prepared(llama), lora(**changes)).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert planned.trainable == sum(p.numel() for p in trained)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {
        n.split(".")[-3 if n.endswith("weight") else -2] for n, p in model.named_parameters() if (p != before[n]).any()
    }
    assert moved == {"lora_embedding_A", "lora_B"}


@pytest.mark.parametrize(
    "fields",
    [
        {"kasa_config": KasaConfig()},
        {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
        {"init_lora_weights": "corda", "corda_config": CordaConfig()},
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["embed_tokens"], nblocks=2, match_strict=False)},
    ],
    ids=["kasa", "lora_ga", "corda", "bdlora"],
)
def test_what_would_be_one_tied_layers_alone_is_refused(fields):
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, **fields)
    model = llama()
    if "lora_ga_config" in fields:
        preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    if "corda_config" in fields:
        preprocess_corda(model, config, lambda: model(input_ids=IDS))
    with pytest.raises((NotImplementedError, ValueError), match="ensure_weight_tying=False"):
        quiet(model, config)
    assert not any("lora" in name for name, _ in model.named_modules())


APART = {
    "rank": {"rank_pattern": {"lm_head": 1, "embed_tokens": 4, "shared": 4}},
    "alpha": {"alpha_pattern": {"lm_head": 7}},
    "rslora": {"use_rslora": True, "rank_pattern": {"lm_head": 4}},
    "dora": {"use_dora": True, "rank_pattern": {"lm_head": 4}},
    "pissa": {"init_lora_weights": "pissa", "alpha_pattern": {"lm_head": 7}},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"lm_head": 1}},
    "pissa-dora": {"init_lora_weights": "pissa_niter_2", "use_dora": True},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fields", APART.values(), ids=APART)
@pytest.mark.parametrize("make", [llama, bart])
def test_tied_layers_with_settings_of_their_own_start_save_and_merge_right(make, fields, tmp_path):
    config = lora(**{"init_lora_weights": True, "target_modules": ["lm_head"], "ensure_weight_tying": True, **fields})
    before, model = logits(prepared_again(make)), quiet(prepared_again(make), config)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05 * p.requires_grad)
    expected = logits(model)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(prepared_again(make), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path / "merged").eval()), logits(merged))
    prepared_again(make).save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "streamed")
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path / "streamed").eval()), logits(merged))


def test_tied_layers_are_one_again_after_a_load_unless_the_file_tells_them_apart(tmp_path):
    model = quiet(llama(), lora(target_modules=["lm_head"], ensure_weight_tying=True))
    model.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for meta in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=meta, is_trainable=True).train()
        optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            loaded(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        base = loaded.get_base_model()
        factor = base.model.embed_tokens.lora_embedding_B["default"]
        assert base.lm_head.lora_A["default"].weight.data_ptr() == factor.data_ptr()
        assert torch.equal(base.lm_head.lora_A["default"].weight, factor.mT)
    state = {k: (v + 1 if "lm_head.lora_A" in k else v).clone().contiguous() for k, v in state.items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.warns(PeftWarning, match="'lm_head' is tied to 'model.embed_tokens' .* other factors for each"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
    found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert all(torch.equal(v, found[k]) for k, v in state.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fields", [{}, *APART.values()], ids=["alike", *APART])
def test_a_combination_of_tied_adapters_is_their_sum(fields):
    config = lora(**{"target_modules": ["lm_head"], "ensure_weight_tying": True, **fields})
    model = quiet(prepared(llama), config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05 * p.requires_grad)
    expected = logits(model)
    for kind in ("linear", "svd", "exact"):
        model.add_weighted_adapter(["default"], [1.0], kind, combination_type=kind)
        model.set_adapter(kind)
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_a_swap_of_other_values_into_tied_tensors_is_refused():
    tied = quiet(llama(), lora(target_modules=["lm_head"], ensure_weight_tying=True))
    apart = quiet(llama(), lora(target_modules=["lm_head", "embed_tokens"]))
    state = get_peft_model_state_dict(apart, save_embedding_layers=False)
    before = logits(tied)
    with pytest.raises(RuntimeError, match=r"tied by ensure_weight_tying, but differ in the new adapter"):
        hotswap_adapter_from_state_dict(tied, state, "default", apart.peft_config["default"])
    assert torch.equal(logits(tied), before)


@pytest.mark.parametrize("torn", ["encoder.embed_tokens.lora_embedding_B", "lm_head.lora_A.weight"])
def test_a_file_with_different_values_for_tied_tensors_is_told(torn):
    model = quiet(t5(), lora(target_modules=["shared"], ensure_weight_tying=True))
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_peft_model_state_dict(model, state)
    state[f"base_model.model.{torn}"] += 1
    with pytest.warns(PeftWarning, match=f"different values for tensors that are tied in adapter 'default'.*{torn}"):
        set_peft_model_state_dict(model, state)


def test_the_configuration_names_the_embedding_as_the_other_library_does():
    model = quiet(llama(), lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    assert model.peft_config["default"].modules_to_save == ["embed_tokens", "model.embed_tokens"]


def test_the_copy_of_a_tied_head_keeps_its_bias():
    base = llama()
    base.lm_head = nn.Linear(8, 32)
    base.lm_head.weight = base.model.embed_tokens.weight
    expected = logits(base.eval())
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    config.init_lora_weights = True
    torch.testing.assert_close(logits(quiet(base, config)), expected)


def test_untied_replicated_layers_leave_the_embedding_tied():
    base, config = llama(), lora(target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        merged = get_peft_model(base, config).merge_and_unload()
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


# ---- biases --------------------------------------------------------------------------------------------------------


def sharing_a_bias() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    net[2].bias = net[4].bias = net[0].bias
    return net.eval()


def with_biases(targets: list[str]) -> PeftModel:
    model = quiet(sharing_a_bias(), lora(target_modules=targets, lora_bias=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.3 if "lora_B" in name else 0)
    return model


@pytest.mark.parametrize("targets", [["0", "2", "4"], ["2"]])
def test_a_merge_unties_biases_too_and_unmerging_ties_them_again(targets):
    model, x = with_biases(targets), torch.randn(3, 8)
    net, expected = model.base_model.model, model(x)
    layers = [layer for _, layer in tuner_layers(net)]
    before = layers[0].get_base_layer().bias
    kept = before.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert all(layer.get_base_layer().bias is before for layer in layers)
    assert torch.equal(before, kept) and torch.equal(model(x), expected)


@pytest.mark.parametrize("lora_bias", [True, False])
def test_biases_that_a_merge_leaves_equal_stay_shared_for_good(lora_bias):
    model = with_biases(["2"]) if lora_bias else quiet(sharing_a_bias(), lora(target_modules=["2"]))
    x = torch.randn(3, 8)
    expected = model(x)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), expected)
    assert plain[4].bias is plain[0].bias and (plain[2].bias is plain[0].bias) is not lora_bias


def test_replicated_layers_get_biases_of_their_own_in_a_merge():
    base = llama()
    for layer in base.model.layers:
        layer.self_attn.v_proj.bias = nn.Parameter(torch.randn(layer.self_attn.v_proj.out_features))
    model = quiet(base, lora(target_modules=["v_proj"], lora_bias=True, layer_replication=[(0, 1), (0, 1)]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.3 if "lora_B" in name else 0)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)
