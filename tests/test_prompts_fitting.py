"""Prompts in models whose words, keys or layers are not all of the hidden size: what is made, and what is refused."""

from __future__ import annotations

import pytest
import torch

import peft
from peft import PeftModel, get_peft_model

transformers = pytest.importorskip("transformers")

K, WORDS = 3, 40
SMALL = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, **SMALL}
BART = {
    "d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_ffn_dim": 24,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_start_token_id": 2, **SMALL,
    "forced_eos_token_id": None,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_expand": 2, "mamba_chunk_size": 4}
SEQ2SEQ = "AutoModelForSeq2SeqLM"
MODELS = {
    "narrow_words": ("OPTConfig", {
        "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 8,
        "max_position_embeddings": 64, **SMALL,
    }),
    "one_key_head": ("FalconConfig", {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, **SMALL,
    }),
    "all_key_heads": ("FalconConfig", {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, **SMALL,
        "new_decoder_architecture": True,
    }),
    "wide_keys": ("T5Config", {
        "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0, **SMALL,
    }),
    "short_decoder": ("BartConfig", BART),
    "long_decoder": ("BartConfig", {**BART, "encoder_layers": 1, "decoder_layers": 3}),
    "decoder_alone": ("BartConfig", {**BART, "is_decoder": True, "is_encoder_decoder": False}),
    "hybrid": ("BambaConfig", {**LLAMA, **MAMBA, "num_key_value_heads": 2, "attn_layer_indices": [1]}),
    "control_codes": ("CTRLConfig", {"n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2, "n_positions": 64, **SMALL}),
    "no_keys": ("Mamba2Config", {
        "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "expand": 2, "head_dim": 4, "num_heads": 8,
        "n_groups": 1, "chunk_size": 4, **SMALL,
    }),
    "no_cache": ("OpenAIGPTConfig", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **SMALL}),
    "latent": ("DeepseekV3Config", {
        **LLAMA, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4,
        "qk_nope_head_dim": 4, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
        "moe_intermediate_size": 8, "first_k_dense_replace": 1,
    }),
}  # fmt: skip
IN_FRONT = {
    "prompt_tuning": ("PromptTuningConfig", {}),
    "of_words": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p_tuning": ("PromptEncoderConfig", {}),
    "multitask": ("MultitaskPromptTuningConfig", {}),
    "cpt": ("CPTConfig", {"num_virtual_tokens": None, "cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4]}),
}
AS_CACHE = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix_projection": ("PrefixTuningConfig", {"prefix_projection": True}),
    "cartridge": ("CartridgeConfig", {}),
}
METHODS = {**IN_FRONT, **AS_CACHE}


def base(family: str):
    name, kwargs = MODELS[family]
    config = getattr(transformers, name, None)
    if config is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    made = config(**kwargs)
    kind = SEQ2SEQ if made.is_encoder_decoder else "AutoModelForCausalLM"
    return getattr(transformers, kind).from_config(made).eval()


def config(method: str, task: str = "CAUSAL_LM", **more):
    name, kwargs = METHODS[method]
    return getattr(peft, name)(**{"task_type": task, "num_virtual_tokens": K, **kwargs, **more})


def texts(**more):
    ids = torch.randint(3, WORDS, (2, 5), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def trains(model: PeftModel, **more) -> float:
    """The loss of one forward, whose gradient reaches every trained tensor."""
    output = model(**texts(labels=texts()["input_ids"], **more))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    return output.loss.item()


@pytest.mark.parametrize("method", IN_FRONT)
def test_virtual_tokens_are_as_wide_as_words(method, tmp_path):
    model = get_peft_model(base("narrow_words"), config(method))
    more = {"task_ids": torch.tensor([0, 0])} if method == "multitask" else {}
    assert trains(model, **more) > 0
    assert model.peft_config["default"].token_dim == 8
    assert model.get_prompt_embedding_to_save("default").shape == (K, 8)
    assert model.generate(**texts(max_new_tokens=2, **more)).shape == (2, 7)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("narrow_words"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**texts(**more)).logits, model.eval()(**texts(**more)).logits)


def test_a_width_that_cannot_be_gives_way_with_a_warning():
    with pytest.warns(peft.errors.PeftWarning, match="token_dim=16 cannot be.*8 wide"):
        model = get_peft_model(base("narrow_words"), config("prompt_tuning", token_dim=16))
    assert trains(model) > 0


@pytest.mark.parametrize(
    "family, width, heads, layers",
    [
        ("one_key_head", 4, 1, 2),
        ("all_key_heads", 16, 4, 2),
        ("wide_keys", 18, 3, 2),
        ("short_decoder", 16, 4, 2),
        ("long_decoder", 16, 4, 3),
        ("decoder_alone", 16, 4, 2),
    ],
)
@pytest.mark.parametrize("method", AS_CACHE)
def test_keys_have_the_heads_and_layers_of_the_decoder(method, family, width, heads, layers, tmp_path):
    model = base(family)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    model = get_peft_model(model, config(method, task))
    found = model.peft_config["default"]
    assert (found.token_dim, found.num_attention_heads, found.num_layers) == (width, heads, layers)
    given = texts(labels=texts()["input_ids"])
    model(**given).loss.backward()
    if family != "long_decoder":  # transformers counts the encoder's layers for the cache of a generation
        assert len(model.generate(**texts(max_new_tokens=2))) == 2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(family), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**given).loss, model.eval()(**given).loss)


@pytest.mark.parametrize("submodules", [1, 2])
@pytest.mark.parametrize("method", AS_CACHE)
def test_the_keys_of_a_layer_are_those_that_files_have_for_so_many_stacks(method, submodules, tmp_path):
    model = get_peft_model(base("long_decoder"), config(method, "SEQ_2_SEQ_LM", num_transformer_submodules=submodules))
    model.save_pretrained(tmp_path)
    entries = model.get_prompt_embedding_to_save("default").reshape(K, 6, 4, 4).permute(1, 2, 0, 3)
    for found in (model, PeftModel.from_pretrained(base("long_decoder"), tmp_path)):
        for i, layer in enumerate(found.get_prompt(1).self_attention_cache.layers):
            assert torch.equal(layer.keys[0], entries[2 * submodules * i % 6])
            assert torch.equal(layer.values[0], entries[(2 * submodules * i + 1) % 6])


@pytest.mark.parametrize("method", AS_CACHE)
def test_a_prefix_stands_in_the_layers_that_keep_keys(method):
    with pytest.warns(peft.errors.PeftWarning, match=r"every layer but \[0\]"):
        model = get_peft_model(base("hybrid"), config(method))
    cached = model.get_prompt(2)
    assert cached.layers[1].keys.shape == (2, 2, K, 4)
    output = model(**texts(labels=texts()["input_ids"]))
    output.loss.backward()
    assert any(p.grad.any() for p in model.parameters() if p.grad is not None)
    model.eval()
    written = model.generate(**texts(max_new_tokens=3, do_sample=False))
    with torch.no_grad():
        for n in (5, 6, 7):  # the very text of forwards over the whole text
            whole = model(input_ids=written[:, :n], attention_mask=torch.ones_like(written[:, :n])).logits
            assert torch.equal(whole[:, -1].argmax(-1), written[:, n])


@pytest.mark.parametrize("family", ["hybrid", "control_codes"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_models_that_do_not_start_from_embeddings_generate_behind_a_prompt(method, family):
    model = get_peft_model(base(family), config(method)).eval()
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    assert len(model.generate(**texts(max_new_tokens=3, num_beams=2))) == 2
    written = model.generate(**texts(max_new_tokens=3, min_new_tokens=3, do_sample=False, eos_token_id=None))
    with torch.no_grad():
        for n in (5, 6, 7):
            whole = model(input_ids=written[:, :n], attention_mask=torch.ones_like(written[:, :n])).logits
            assert torch.equal(whole[:, -1].argmax(-1), written[:, n])


@pytest.mark.parametrize(
    "family, more, words",
    [
        ("latent", {}, "kv_lora_rank=8"),
        ("no_keys", {}, "No layer of the model keeps keys"),
        ("narrow_words", {"num_transformer_submodules": 2}, "one stack of layers"),
    ],
)
@pytest.mark.parametrize("method", AS_CACHE)
def test_a_prefix_that_has_no_place_is_refused(method, family, more, words):
    model = base(family)
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, config(method, **more))


def test_a_model_without_a_cache_is_refused_by_name():
    model = get_peft_model(base("no_cache"), config("prefix"))
    with pytest.raises(ValueError, match="takes no past_key_values"):
        model(**texts())
    answers = transformers.T5ForQuestionAnswering(transformers.T5Config(**MODELS["wide_keys"][1]))
    model = get_peft_model(answers, config("prefix", "QUESTION_ANS"))
    with pytest.raises(ValueError, match="T5ForQuestionAnswering takes no past_key_values"):
        model(**texts())


def gemma(**more):
    kind = getattr(transformers, "Gemma4TextConfig", None)
    if kind is None:
        pytest.skip("this transformers has no Gemma 4")
    types = ["sliding_attention", "full_attention"]
    sizes = {"num_key_value_heads": 2, "head_dim": 4, "global_head_dim": 8, "hidden_size_per_layer_input": 4, **more}
    made = kind(
        **LLAMA, **sizes, layer_types=types, sliding_window=8, num_kv_shared_layers=0, vocab_size_per_layer_input=WORDS
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(made).eval()


@pytest.mark.parametrize("method", AS_CACHE)
def test_layers_with_smaller_heads_take_a_part_of_the_prefix(method):
    model = get_peft_model(gemma(), config(method))
    assert (model.peft_config["default"].token_dim, model.peft_config["default"].num_attention_heads) == (16, 2)
    shapes = [tuple(layer.keys.shape) for layer in model.get_prompt(2).layers]
    assert shapes == [(2, 2, K, 4), (2, 2, K, 8)]
    whole = model.prompt_encoder["default"].prompt(1).reshape(K, 4, 2, 8)
    assert torch.equal(model.get_prompt(1).layers[0].values[0], whole[:, 1, :, :4].transpose(0, 1))
    model(**texts(labels=texts()["input_ids"])).loss.backward()
    assert len(model.generate(**texts(max_new_tokens=2))) == 2


def test_layers_with_more_heads_than_the_prefix_are_left_out():
    model = gemma(attention_k_eq_v=True, num_global_key_value_heads=1)
    with pytest.warns(peft.errors.PeftWarning, match=r"every layer but \[0\]"):
        model = get_peft_model(model, config("prefix"))
    assert model.get_prompt(2).layers[1].keys.shape == (2, 1, K, 8)
    model(**texts(labels=texts()["input_ids"])).loss.backward()


def nano():
    kind = getattr(transformers, "Gemma3nTextConfig", None)
    if kind is None:
        pytest.skip("this transformers has no Gemma 3n")
    made = kind(
        **{**LLAMA, "intermediate_size": [24, 24]}, num_key_value_heads=2, head_dim=4, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=WORDS, layer_types=["sliding_attention", "full_attention"], sliding_window=8,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0], laurel_rank=2, altup_num_inputs=2,
        altup_active_idx=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0) if "correct_output_scale" in name else None  # at zero these embeddings have no effect
    return model


@torch.no_grad()
@pytest.mark.parametrize("make", [gemma, nano])
def test_layers_read_the_words_of_a_context_as_words(make):
    plain = make()
    context = torch.tensor([[5, 6, 7]]).expand(2, -1)
    wanted = plain(input_ids=torch.cat([context, texts()["input_ids"]], 1)).logits
    assert torch.equal(get_peft_model(plain, config("cpt")).eval()(**texts()).logits, wanted)


@pytest.mark.parametrize("make", [gemma, nano])
@torch.no_grad()
def test_layers_that_read_the_ids_themselves_read_padding_for_virtual_tokens(make):
    plain = make()
    padding = torch.zeros(2, K, dtype=torch.long)
    wanted = plain(input_ids=torch.cat([padding, texts()["input_ids"]], 1)).logits
    model = get_peft_model(plain, config("prompt_tuning")).eval()
    model.prompt_encoder["default"].embedding.weight.copy_(plain.get_input_embeddings()(padding[0]))
    assert torch.equal(model(**texts()).logits, wanted)
    model.prompt_encoder["default"].embedding.weight.normal_()
    written = model.generate(**texts(max_new_tokens=3, min_new_tokens=3, do_sample=False, eos_token_id=None))
    for n in (5, 6, 7):
        whole = model(input_ids=written[:, :n], attention_mask=torch.ones_like(written[:, :n])).logits
        assert torch.equal(whole[:, -1].argmax(-1), written[:, n])
    assert len(model.generate(**texts(max_new_tokens=2, num_beams=2))) == 2
