"""Prompts in front of tiny models: what they compute, by hand-made inputs; and how they generate."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import peft
from peft import PeftModel, get_peft_model

transformers = pytest.importorskip("transformers")

K, WORDS = 4, 40
SMALL = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, **SMALL}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0, **SMALL}
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**LLAMA, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **SMALL}),
    "opt": ("OPTConfig", "OPTForCausalLM", {
        "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16,
        "max_position_embeddings": 64, **SMALL,
    }),
}  # fmt: skip
IN_FRONT = {
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": K}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": K, "encoder_hidden_size": 8}),
    "p_tuning_lstm": ("PromptEncoderConfig", {"num_virtual_tokens": K, "encoder_reparameterization_type": "LSTM"}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": K, "num_tasks": 2}),
    "cpt": ("CPTConfig", {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4]}),
}
AS_CACHE = {
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": K}),
    "prefix_projection": ("PrefixTuningConfig", {"num_virtual_tokens": K, "prefix_projection": True}),
    "cartridge": ("CartridgeConfig", {"num_virtual_tokens": K}),
}
METHODS = {**IN_FRONT, **AS_CACHE}
each_model = pytest.mark.parametrize("family", MODELS)
each_method = pytest.mark.parametrize("method", METHODS)


def base(family: str, **more):
    config, model, kwargs = MODELS[family]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**kwargs, **more)).eval()


def config(method: str, **more):
    name, kwargs = METHODS[method]
    return getattr(peft, name)(**{"task_type": "CAUSAL_LM", **kwargs, **more})


def prompted(family: str, method: str, **more) -> PeftModel:
    model = base(family)
    torch.manual_seed(1)
    model = get_peft_model(model, config(method, **more)).eval()
    with torch.no_grad():
        for p in model.prompt_encoder["default"].trained():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tasks(method: str, rows: int):
    return {"task_ids": torch.arange(rows) % 2} if method == "multitask" else {}


def ids(rows: int = 2, length: int = 5, seed: int = 3):
    return torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def by_hand(model: PeftModel, method: str, text, mask=None, cache=True):
    """Logits of the text's tokens from inputs made here: embeddings side by side, or a cache filled layer by layer."""
    plain, encoder, rows = model.get_base_model(), model.prompt_encoder["default"], len(text)
    mask = torch.ones_like(text) if mask is None else mask
    whole = torch.cat([mask.new_ones(rows, K), mask], 1)
    made = encoder.prompt(rows, **tasks(method, rows))
    if method in IN_FRONT:
        embedded = torch.cat([made, plain.get_input_embeddings()(text)], 1)
        return plain(inputs_embeds=embedded, attention_mask=whole).logits
    c = plain.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    entries = made.view(rows, K, 2 * c.num_hidden_layers, heads, -1).permute(2, 0, 3, 1, 4)
    filled = transformers.DynamicCache()
    for i in range(c.num_hidden_layers):
        filled.update(entries[2 * i], entries[2 * i + 1], i)
    return plain(input_ids=text, attention_mask=whole, past_key_values=filled).logits


def greedy(model: PeftModel, method: str, text, mask, steps: int):
    """The tokens that the largest logit of a whole forward chooses, one after the other, without a cache."""
    for _ in range(steps):
        logits = by_hand(model, method, text, mask)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return text


@each_model
@each_method
@torch.no_grad()
def test_the_forward_is_that_of_inputs_made_by_hand(family, method):
    model, text = prompted(family, method), ids()
    found = model(input_ids=text, **tasks(method, 2)).logits
    torch.testing.assert_close(found, by_hand(model, method, text), atol=1e-5, rtol=1e-5)
    assert found.shape[1] == 5 + (K if method in IN_FRONT else 0)
    embedded = model.get_input_embeddings()(text)
    again = model(inputs_embeds=embedded, **tasks(method, 2)).logits
    torch.testing.assert_close(found, again, atol=1e-6, rtol=1e-6)


@each_model
@each_method
@torch.no_grad()
def test_padding_on_the_left_changes_nothing_that_is_not_padding(family, method):
    model, text = prompted(family, method), ids(1)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), text], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    given = {"input_ids": padded, "attention_mask": mask, **tasks(method, 1)}
    if family == "gpt2":  # which counts padding unless it is told
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(**given)
    torch.testing.assert_close(found.logits[:, -5:], by_hand(model, method, text)[:, -5:], atol=1e-5, rtol=1e-5)


SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOWED = {
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
    "Gemma3Text": {"sliding_window": 4, "head_dim": 8},
    "Cohere2": {"sliding_window": 4, "eos_token_id": 1, "bos_token_id": 1},
}


@pytest.mark.parametrize("family", WINDOWED)
@each_method
@torch.no_grad()
def test_layers_with_a_window_see_of_the_prompt_what_they_see_of_it_alone(family, method):
    """As keys and values the prompt stays in front of the padding, which is told."""
    name = f"{family.removesuffix('Text')}ForCausalLM"
    if not hasattr(transformers, name):
        pytest.skip("this release has no such model")
    torch.manual_seed(0)
    bare = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**SIZES, **WINDOWED[family])).eval()
    model = get_peft_model(bare, config(method, **({"num_layers": 4} if method not in IN_FRONT else {}))).eval()
    for p in model.prompt_encoder["default"].trained():
        p.add_(0.3 * torch.randn_like(p))
    text, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = text[1, :4] = 0
    given = {"input_ids": text, "attention_mask": mask, **tasks(method, 2)}
    if method not in IN_FRONT:
        with pytest.warns(peft.PeftWarning, match="look back 4 tokens, padding on the left among them"):
            model(**given)
        return
    second = {"input_ids": text[1:, 4:], **{k: v[1:] for k, v in tasks(method, 2).items()}}
    torch.testing.assert_close(model(**given).logits[1:, -5:], model(**second).logits[:, -5:], atol=1e-5, rtol=1e-5)
    more = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(**second, **more)[:, -5:]
    assert torch.equal(model.generate(**given, **more)[1:, -5:], alone)
    with torch.enable_grad():  # and losses are those of the texts
        labels = text.masked_fill(mask == 0, -100)
        whole = model(**{k: v[1:] for k, v in given.items()}, labels=labels[1:]).loss
        torch.testing.assert_close(whole, model(**second, labels=labels[1:, 4:]).loss)


@each_model
@each_method
@torch.no_grad()
def test_generate_is_greedy_choice_by_whole_forwards(family, method):
    model, text = prompted(family, method), ids()
    model.generation_config.eos_token_id = None
    more = {"max_new_tokens": 6, "do_sample": False, **tasks(method, 2)}
    wanted = greedy(model, method, text, torch.ones_like(text), 6)
    assert torch.equal(model.generate(input_ids=text, **more), wanted)
    assert torch.equal(model.generate(text, **more), wanted)
    assert torch.equal(model.generate(input_ids=text, attention_mask=torch.ones_like(text), **more), wanted)
    assert torch.equal(model.generate(input_ids=text, max_length=11, do_sample=False, **tasks(method, 2)), wanted)
    assert torch.equal(model.generate(input_ids=text, use_cache=False, **more), wanted)
    assert torch.equal(model.generate(input_ids=text, prefill_chunk_size=2, **more), wanted)
    model.generation_config.eos_token_id = int(wanted[0, 7])
    assert torch.equal(model.generate(input_ids=text, eos_token_id=None, **more), wanted)


@each_model
@each_method
@torch.no_grad()
def test_a_left_padded_batch_generates_what_each_text_does_alone(family, method):
    model, text = prompted(family, method), ids(2, 7)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(text)
    mask[1, :2] = 0
    text[1, :2] = 0
    more = {"max_new_tokens": 5, "do_sample": False, **tasks(method, 2)}
    rows = [
        model.generate(
            input_ids=text[i : i + 1, s:], **{**more, **{k: v[i : i + 1] for k, v in tasks(method, 2).items()}}
        )
        for i, s in ((0, 0), (1, 2))
    ]
    alone = torch.cat([row[:, -5:] for row in rows])
    found = model.generate(input_ids=text, attention_mask=mask, **more)
    assert torch.equal(found, torch.cat([text, alone], 1))
    assert torch.equal(model.generate(input_ids=text, **more), found)  # the padding is told from the ids


@each_model
@each_method
@torch.no_grad()
def test_beams_samples_and_several_sequences_run(family, method):
    model, text = prompted(family, method), ids()
    more = {"max_new_tokens": 4, "min_new_tokens": 4, **tasks(method, 2)}
    beams = model.generate(input_ids=text, num_beams=3, num_return_sequences=2, do_sample=False, **more)
    assert beams.shape == (4, 9) and torch.equal(beams[::2, :5], text)
    torch.manual_seed(5)
    drawn = model.generate(input_ids=text, do_sample=True, num_return_sequences=2, **more)
    assert drawn.shape == (4, 9)
    one = model.generate(input_ids=text, num_beams=1, do_sample=False, **more)
    assert torch.equal(one[:, :5], text)

    def score(tokens, rows):
        whole = by_hand(model, method, tokens) if method != "multitask" else torch.stack(
            [by_hand_row(model, tokens[i:i + 1], rows[i]) for i in range(len(tokens))])  # fmt: skip
        chosen = whole[:, -5:-1].log_softmax(-1)
        return chosen.gather(-1, tokens[:, -4:, None]).sum((1, 2))

    assert (score(beams[::2], [0, 1]) >= score(one, [0, 1]) - 1e-4).all() or 2 in beams


def by_hand_row(model, text, task):
    plain, encoder = model.get_base_model(), model.prompt_encoder["default"]
    made = encoder.prompt(1, torch.tensor([task]))
    embedded = torch.cat([made, plain.get_input_embeddings()(text)], 1)
    return plain(inputs_embeds=embedded, attention_mask=torch.ones(1, K + text.shape[1], dtype=torch.long)).logits[0]


@each_model
@each_method
def test_only_the_prompt_has_a_gradient_and_the_base_stays_as_it_is(family, method):
    model, text = prompted(family, method), ids()
    before = {k: v.clone() for k, v in model.get_base_model().state_dict().items()}
    own = set(vars(model.get_base_model()))
    model.train()
    out = model(input_ids=text, labels=text, **tasks(method, 2))
    out.loss.backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert found and all(n.startswith("prompt_encoder.default.") for n in found)
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= found
    model.eval()
    model.generate(input_ids=text, max_new_tokens=2, do_sample=False, **tasks(method, 2))
    assert set(vars(model.get_base_model())) == own
    assert all(torch.equal(v, before[k]) for k, v in model.get_base_model().state_dict().items())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"cpt"}))  # whose loss is its own
@torch.no_grad()
def test_labels_that_are_ignored_count_for_nothing_in_the_loss(method):
    model, text = prompted("llama", method), ids()
    labels = text.clone()
    labels[:, :2] = -100
    out = model(input_ids=text, labels=labels, **tasks(method, 2))
    logits = out.logits[:, -5:]
    wanted = torch.nn.functional.cross_entropy(logits[:, 1:-1].reshape(-1, WORDS), labels[:, 2:].reshape(-1))
    torch.testing.assert_close(out.loss, wanted)


@each_method
@torch.no_grad()
def test_saved_and_loaded_is_equal_bit_for_bit(method, tmp_path):
    model, text = prompted("qwen2", method), ids()
    wanted = model(input_ids=text, **tasks(method, 2)).logits
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(base("qwen2"), tmp_path, low_cpu_mem_usage=low)
        torch.testing.assert_close(again(input_ids=text, **tasks(method, 2)).logits, wanted, atol=1e-6, rtol=1e-6)
        again.save_pretrained(tmp_path / "again")
        one, other = (peft.load_peft_weights(str(p)) for p in (tmp_path, tmp_path / "again"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", peft.PeftWarning)  # a network is left behind
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(input_ids=text, **tasks(method, 2)).logits, wanted, atol=1e-6, rtol=1e-6)


@each_method
@torch.no_grad()
def test_adapters_are_added_switched_disabled_and_deleted(method):
    model, text = prompted("llama", method), ids()

    def run():
        return model(input_ids=text, **tasks(method, 2)).logits

    first, plain = run(), base("llama")(input_ids=text).logits
    model.add_adapter("other", config(method))
    assert torch.equal(run(), first) and model.active_adapter == "default"
    model.set_adapter("other")
    if method != "cpt":  # moves start at zero and the words are the same
        assert not torch.equal(run(), first)
    trained = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"other"}
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(run(), plain)
        assert torch.equal(run(), plain)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        1 / 0  # noqa: B018
    model.set_adapter("default")
    assert torch.equal(run(), first)
    model.set_adapter("other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("other")
        assert model.active_adapter == "default" and torch.equal(run(), first)
        model.delete_adapter("default")
    assert torch.equal(run(), plain)
    with pytest.raises(ValueError, match="There is no adapter"):
        model.set_adapter("default")


@each_method
@torch.no_grad()
def test_copies_and_pickles_compute_the_same(method):
    model, text = prompted("llama", method), ids()
    wanted = model(input_ids=text, **tasks(method, 2)).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=text, **tasks(method, 2)).logits, wanted)
        for p in twin.prompt_encoder["default"].parameters():
            p.zero_()
        assert not torch.equal(twin(input_ids=text, **tasks(method, 2)).logits, wanted)
        assert torch.equal(model(input_ids=text, **tasks(method, 2)).logits, wanted)
        with twin.disable_adapter():
            assert torch.equal(twin(input_ids=text).logits, base("llama")(input_ids=text).logits)
    assert torch.equal(model(input_ids=text, **tasks(method, 2)).logits, wanted)


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_base_in_half_precision_runs_and_generates(method, dtype):
    model = base("llama").to(dtype)
    model = get_peft_model(model, config(method)).eval()
    text = ids()
    assert model(input_ids=text, **tasks(method, 2)).logits.dtype is dtype
    assert model.generate(input_ids=text, max_new_tokens=3, min_new_tokens=3, **tasks(method, 2)).shape == (2, 8)
    assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", IN_FRONT)
def test_gradient_checkpointing_gives_the_same_gradient(method):
    text, grads = ids(), []
    for checkpointing in (False, True):
        model = prompted("llama", method)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(input_ids=text, labels=text, **tasks(method, 2)).loss.backward()
        grads.append([p.grad for p in model.prompt_encoder["default"].trained()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


@pytest.mark.parametrize("method", AS_CACHE)
def test_gradient_checkpointing_and_a_prefix_give_the_same_gradient_or_an_error(method):
    model, text = prompted("llama", method), ids()
    model.train()
    model(input_ids=text, labels=text).loss.backward()
    wanted = [p.grad.clone() for p in model.prompt_encoder["default"].trained()]
    model.zero_grad()
    try:
        model.gradient_checkpointing_enable()
        model(input_ids=text, labels=text).loss.backward()
    except ValueError as error:
        assert "checkpointing" in str(error)
        return
    for one, other in zip(wanted, (p.grad for p in model.prompt_encoder["default"].trained()), strict=True):
        torch.testing.assert_close(one, other)


def test_what_client_code_reads_is_there():
    model = prompted("llama", "prompt_tuning")
    with pytest.raises(TypeError, match="PROMPT_TUNING"):
        model.get_layer_status()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(1, 3))
    assert model.prompt_tokens["default"].tolist() == list(range(K))
    assert model.word_embeddings is model.get_input_embeddings()
    assert model.get_prompt(4).shape == (4, K, 16)
    assert model.get_prompt_embedding_to_save("default").shape == (K, 16)
    assert model.active_peft_config.is_prompt_learning and model.active_peft_config.num_virtual_tokens == K


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_positions_that_are_given_move_behind_the_prompt(method):
    model, text = prompted("llama", method), ids()
    given = model(input_ids=text, position_ids=torch.arange(5)[None], **tasks(method, 2)).logits
    torch.testing.assert_close(given, model(input_ids=text, **tasks(method, 2)).logits)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_the_forward_compiles(method):
    model, text = prompted("llama", method), ids()
    wanted = model(input_ids=text, **tasks(method, 2)).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=text, **tasks(method, 2)).logits, wanted)


@each_model
@each_method
@pytest.mark.parametrize("covered", ["text", "all", None])
@torch.no_grad()
def test_a_loop_over_the_cache_by_hand_gives_what_whole_forwards_give(family, method, covered):
    """The mask of a further step may cover the text, or what the cache holds, or be left out."""
    model, text = prompted(family, method), ids()
    out = model(input_ids=text, use_cache=True, **tasks(method, 2))
    for _ in range(3):
        new = out.logits[:, -1:].argmax(-1)
        text = torch.cat([text, new], 1)
        length = text.shape[1] + (K if covered == "all" else 0)
        mask = {} if covered is None else {"attention_mask": torch.ones(2, length, dtype=torch.long)}
        out = model(input_ids=new, past_key_values=out.past_key_values, **mask, **tasks(method, 2))
        wanted = by_hand(model, method, text)[:, -1:]
        torch.testing.assert_close(out.logits, wanted, atol=1e-5, rtol=1e-5)
