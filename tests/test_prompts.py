"""Prompt learning: how virtual tokens and prefixes enter a model, against inputs put together by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim, export

import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

transformers = pytest.importorskip("transformers")
from transformers.cache_utils import DynamicCache  # noqa: E402

WORDS, SIZE, K = 40, 16, 3
SMALL = {"vocab_size": WORDS, "hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=24, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=SIZE, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def opt():
    config = transformers.OPTConfig(
        vocab_size=WORDS, hidden_size=SIZE, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        word_embed_proj_dim=SIZE, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def bert(kind: str) -> Any:
    config = transformers.BertConfig(
        **SMALL,
        intermediate_size=24,
        num_labels=2 if "Question" in kind else 3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return getattr(transformers, kind)(config)


def t5():
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=SIZE, d_ff=24, num_layers=2, num_heads=4, d_kv=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt}
CONFIGS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 12}),
    "p-tuning-lstm": (peft.PromptEncoderConfig, {"encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"}),
    "multitask": (peft.MultitaskPromptTuningConfig, {"num_tasks": 3, "num_ranks": 2}),
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix-projection": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 12}),
    "cpt": (peft.CPTConfig, {"cpt_token_ids": [3, 4, 5], "cpt_tokens_type_mask": [1, 2, 4]}),
}
IN_FRONT = ("prompt", "p-tuning", "p-tuning-lstm", "multitask", "cpt")
CACHED = ("prefix", "prefix-projection")


def config(name: str, task: str = "CAUSAL_LM", **more: Any) -> Any:
    kind, fields = CONFIGS[name]
    fields = {**fields, **({} if kind is peft.CPTConfig else {"num_virtual_tokens": K})}
    return kind(task_type=task, **{**fields, **more})


def made(name: str, base: str = "llama", task: str = "CAUSAL_LM", **more: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(MODELS[base]() if base in MODELS else bert(base), config(name, task, **more))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape)
    return model.eval()


def text(batch: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, WORDS, (batch, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tasks(name: str, batch: int = 2) -> dict[str, torch.Tensor]:
    return {"task_ids": torch.arange(batch) % 3} if name == "multitask" else {}


def by_hand(model: Any, name: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the base model on what the prompt makes of the text."""
    base, batch = model.get_base_model(), len(ids)
    more = torch.ones(batch, K, dtype=mask.dtype)
    if name in IN_FRONT:
        prompt = model.get_prompt(batch, **tasks(name, batch))
        embedded = torch.cat([prompt, base.get_input_embeddings()(ids)], 1)
        return base(inputs_embeds=embedded, attention_mask=torch.cat([more, mask], 1)).logits
    flat = model.get_prompt_embedding_to_save("default")
    heads = getattr(base.config, "num_key_value_heads", None) or base.config.num_attention_heads
    cache, size = DynamicCache(), flat.shape[1] // 4
    for layer in range(2):
        key, value = (flat[:, (2 * layer + j) * size :][:, :size].reshape(K, heads, -1) for j in (0, 1))
        expand = (t.transpose(0, 1)[None].expand(batch, -1, -1, -1).contiguous() for t in (key, value))
        cache.update(*expand, layer)
    return base(input_ids=ids, attention_mask=torch.cat([more, mask], 1), past_key_values=cache).logits


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_is_the_base_on_inputs_put_together_by_hand(name, base):
    model, given = made(name, base), text()
    with torch.no_grad():
        found = model(**given, **tasks(name)).logits
        torch.testing.assert_close(found, by_hand(model, name, *given.values()), rtol=1e-5, atol=1e-5)
        assert found.shape[1] == 5 + (K if name in IN_FRONT else 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_prompt_learns(name):
    model, given = made(name), text()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(**given, labels=given["input_ids"], **tasks(name)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert losses[-1] < losses[0]
    assert moved and all(n.startswith("prompt_encoder.default.") for n in moved)


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_is_the_greedy_or_beam_search_of_the_forward(name, beams, base):
    model, given = made(name, base), text()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, **tasks(name)}
    found = model.generate(**given, **options)
    assert found.shape == (2, 9) and torch.equal(found[:, :5], given["input_ids"])
    assert torch.equal(found, model.generate(**given, **options, use_cache=False))
    if beams == 1:
        ids = given["input_ids"]
        for _ in range(4):
            with torch.no_grad():
                scores = model(input_ids=ids, attention_mask=torch.ones_like(ids), **tasks(name)).logits[:, -1]
            scores[:, 2] = -torch.inf  # the end comes no sooner
            ids = torch.cat([ids, scores.argmax(-1)[:, None]], 1)
        assert torch.equal(found, ids)


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_padding_on_the_left_changes_nothing_generated(name, base):
    model, given = made(name, base), text(batch=1)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone = model.generate(**given, **options)[:, 5:]
    pad = torch.zeros(1, 2, dtype=torch.long)
    padded = {k: torch.cat([pad, v], 1) for k, v in given.items()}
    assert torch.equal(model.generate(**padded, **options)[:, 7:], alone)
    del padded["attention_mask"]  # the padding is told from the ids
    assert torch.equal(model.generate(**padded, **options)[:, 7:], alone)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_lengths_and_arguments_by_position_count_the_ids(name):
    model, given = made(name), text()
    options = {"do_sample": False, "min_new_tokens": 6}
    new = model.generate(given["input_ids"], max_new_tokens=6, **options)
    assert torch.equal(new, model.generate(given["input_ids"], max_length=11, **options))
    setting = transformers.GenerationConfig(max_length=11, do_sample=False, min_new_tokens=6, eos_token_id=2)
    assert torch.equal(new, model.generate(given["input_ids"], generation_config=setting))
    assert setting.max_length == 11
    many = model.generate(given["input_ids"], do_sample=True, num_return_sequences=3, max_new_tokens=2)
    assert len(many) == 6


@pytest.mark.parametrize("name", IN_FRONT)
def test_positions_token_types_and_masks_go_with_the_text(name):
    model, given = made(name, "gpt2"), text()
    positions = torch.arange(7, 12).expand(2, -1)
    types = torch.tensor([[4, 5, 4, 5, 4]] * 2)
    half = {**given, "attention_mask": given["attention_mask"].bool()}
    with torch.no_grad():
        found = model(**half, position_ids=positions, token_type_ids=types, **tasks(name)).logits
        base, batch = model.get_base_model(), 2
        prompt = model.get_prompt(batch, **tasks(name))
        wanted = base(
            inputs_embeds=torch.cat([prompt, base.transformer.wte(given["input_ids"])], 1),
            position_ids=torch.cat([torch.arange(K).expand(2, -1), positions + K], 1),
            token_type_ids=torch.cat([torch.zeros(2, K, dtype=torch.long), types], 1),
        ).logits
    torch.testing.assert_close(found, wanted)


HEADS = {
    "SEQ_CLS": ("BertForSequenceClassification", {"labels": torch.tensor([0, 2])}),
    "TOKEN_CLS": ("BertForTokenClassification", {"labels": torch.tensor([[0, 1, 2, 0, 1]] * 2)}),
    "QUESTION_ANS": (
        "BertForQuestionAnswering",
        {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])},
    ),
    "FEATURE_EXTRACTION": ("BertModel", {}),
}


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", ["prompt", "p-tuning", "multitask", "prefix"])
def test_every_head_runs_has_its_loss_and_is_saved_with_the_prompt(name, task, tmp_path):
    kind, labels = HEADS[task]
    model, given = made(name, kind, task), text()
    types = {"token_type_ids": torch.tensor([[0, 0, 1, 1, 1]] * 2)}
    out = model(**given, **types, **labels, **tasks(name))
    if labels:
        out.loss.backward()
        encoder = model.prompt_encoder["default"]
        assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert_like(model), tmp_path).eval()
    assert type(again) is type(model)
    with torch.no_grad():
        first, second = (m(**given, **types, **tasks(name)) for m in (model, again))
    for key in ("logits", "start_logits", "last_hidden_state"):
        if key in first:
            torch.testing.assert_close(first[key], second[key], rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in again.parameters())


def bert_like(model: Any) -> nn.Module:
    """A base model with the weights that the prompt was put on."""
    return copy.deepcopy(model.unload()) if not model.modules_to_save else _plain(model)


def _plain(model: Any) -> nn.Module:
    twin = copy.deepcopy(model)
    for path, module in list(twin.get_base_model().named_modules()):
        if hasattr(module, "original_module"):
            parent, _, leaf = path.rpartition(".")
            setattr(twin.get_base_model().get_submodule(parent), leaf, module.original_module)
    return twin.get_base_model()


@pytest.mark.parametrize("name", ["prompt", "p-tuning", "multitask", "prefix", "prefix-projection"])
def test_an_encoder_with_a_decoder_learns_and_generates(name):
    torch.manual_seed(0)
    model = get_peft_model(t5(), config(name, "SEQ_2_SEQ_LM"))
    given = text()
    out = model(**given, labels=given["input_ids"][:, :4].contiguous(), **tasks(name))
    out.loss.backward()
    assert all(p.grad is not None for p in model.prompt_encoder.parameters())
    model.eval()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **tasks(name)}
    greedy = model.generate(**given, **options)
    assert greedy.shape == (2, 5)
    if name != "multitask":  # there the decoder has tokens of its own in training
        ids = torch.zeros(2, 1, dtype=torch.long)
        for _ in range(4):
            with torch.no_grad():
                scores = model(**given, decoder_input_ids=ids, **tasks(name)).logits[:, -1]
            scores[:, 1] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1)[:, None]], 1)
        assert torch.equal(greedy, ids)
    assert len(model.generate(**given, **{**options, "num_beams": 2})) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_files_bring_back_the_outputs_and_the_base(name, tmp_path):
    model, given = made(name), text()
    base = copy.deepcopy(model.get_base_model())
    with torch.no_grad():
        wanted = model(**given, **tasks(name)).logits
        with model.disable_adapter(), model.disable_adapter():
            off = model(**given).logits
        assert torch.equal(off, base(**given).logits)
        assert torch.equal(wanted, model(**given, **tasks(name)).logits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True).eval()
    with torch.no_grad():
        assert torch.equal(again(**given, **tasks(name)).logits, wanted)
    assert list(get_peft_model_state_dict(again)) == list(get_peft_model_state_dict(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(**given, **tasks(name)).logits, wanted)
        assert twin.get_base_model() is not model.get_base_model()
    assert again.unload() is again.get_base_model()


@pytest.mark.parametrize("name", ["prompt", "p-tuning", "prefix-projection"])
def test_loading_in_place_leaves_the_network_behind_and_says_so(name, tmp_path):
    model, given = made(name), text()
    with torch.no_grad():
        wanted = model(**given).logits
    model.save_pretrained(tmp_path)
    for p in model.prompt_encoder.parameters():
        p.data.zero_()
    if name == "prompt":
        model.load_adapter(tmp_path, "default")
    else:
        with pytest.warns(peft.PeftWarning, match="network that made it is left behind"):
            model.load_adapter(tmp_path, "default")
    assert torch.equal(model(**given).logits, wanted)
    assert any(p.requires_grad for p in model.prompt_encoder.parameters())


@pytest.mark.parametrize("name, other", [("prompt", "prompt"), ("prefix", "prefix")])
def test_several_adapters_are_switched_added_and_deleted(name, other):
    model, given = made(name), text()
    with torch.no_grad():
        first = model(**given).logits
        model.add_adapter("second", config(other))
        assert torch.equal(model(**given).logits, first)
        model.set_adapter("second")
        second = model(**given).logits
        assert not torch.equal(first, second)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(".second." in n for n in trained)
        with pytest.warns(UserWarning, match="Setting active adapter to 'default'"):
            model.delete_adapter("second")
        assert torch.equal(model(**given).logits, first)
        model.delete_adapter("default")
        assert torch.equal(model(**given).logits, model.get_base_model()(**given).logits)


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("name", ["prompt", "p-tuning", "multitask", "prefix", "prefix-projection"])
def test_samples_of_a_batch_may_have_prompts_of_their_own_or_none(name, base):
    model, given = made(name, base), text(batch=3)
    model.add_adapter("other", config(name))
    model.prompt_encoder.eval()
    names, options = ["other", "__base__", "default"], {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    found = model(**given, adapter_names=names, **tasks(name, 3)).logits
    words = model.generate(**given, adapter_names=names, **options, **tasks(name, 3))
    for i, one in enumerate(names):
        row = {k: v[i : i + 1] for k, v in {**given, **tasks(name, 3)}.items()}
        if one == "__base__":
            with model.disable_adapter():
                alone, said = model(**row).logits, model.generate(**row, **options)
        else:
            model.set_adapter(one)
            alone, said = model(**row).logits, model.generate(**row, **options)
        torch.testing.assert_close(found[i : i + 1, -5:], alone[:, -5:], rtol=1e-4, atol=1e-5)
        assert torch.equal(words[i : i + 1], said)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_in_a_mixed_batch_each_sample_has_the_head_of_its_adapter(name):
    model, given = made(name, "BertForSequenceClassification", "SEQ_CLS"), text()
    model.add_adapter("other", config(name, "SEQ_CLS"))
    for p in model.adapter_parameters("other").values():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = model(**given, adapter_names=["default", "other"]).logits
        alone = model(**given).logits
        model.set_adapter("other")
        other = model(**given).logits
        assert not torch.allclose(other, alone)
        torch.testing.assert_close(found, torch.stack([alone[0], other[1]]))
        if name == "prompt":  # its virtual tokens are the first that the head reads
            with pytest.raises(ValueError, match="reads the first token"):
                model(**given, adapter_names=["default", "__base__"])
            return
        found = model(**given, adapter_names=["default", "__base__"]).logits
        with model.disable_adapter():
            base = model(**given).logits
    torch.testing.assert_close(found, torch.stack([alone[0], base[1]]))


@pytest.mark.parametrize("name", IN_FRONT)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, given = made(name), text()
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**given, labels=given["input_ids"], **tasks(name)).loss.backward()
        found.append([p.grad.clone() for p in model.prompt_encoder.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_prompt_may_start_from_words(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": str(tmp_path), "prompt_tuning_init_text": "good"}
    torch.manual_seed(0)
    model = get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **start))
    words = model.get_base_model().get_input_embeddings().weight
    assert torch.equal(model.get_prompt(1)[0], words[[2, 5, 3, 2, 5]])
    drawn = get_peft_model(llama(), config("prompt", prompt_tuning_init="SAMPLE_VOCAB"))
    rows = drawn.get_base_model().get_input_embeddings().weight
    assert all((rows == token).all(1).any() for token in drawn.get_prompt(1)[0])


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_multitask_prompts_may_start_from_source_tasks(start, tmp_path):
    source = made("multitask")
    source.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(source)
    more = {"num_tasks": 1, "num_ranks": 2, "prompt_tuning_init_task": 2, "num_virtual_tokens": K}
    path = str(tmp_path / "adapter_model.safetensors")
    new = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", prompt_tuning_init=start, prompt_tuning_init_state_dict_path=path, **more
    )
    found = get_peft_model_state_dict(get_peft_model(llama(), new))
    assert torch.equal(found["prompt_embeddings"], state["prompt_embeddings"])
    if start == "AVERAGE_SOURCE_TASKS":
        torch.testing.assert_close(found["prefix_task_cols"], state["prefix_task_cols"].mean(0, keepdim=True))
    if start == "EXACT_SOURCE_TASK":
        assert torch.equal(found["prefix_task_rows"][0], state["prefix_task_rows"][2])


def test_moves_of_a_context_stay_within_their_room_and_labels_stay_put():
    model = made("cpt")
    encoder = model.prompt_encoder["default"]
    encoder.delta_embedding.weight.data.fill_(1.0)
    before = model.get_base_model().get_input_embeddings().weight[[3, 4, 5]]
    moved = (model.get_prompt(1)[0] - before).norm(dim=1)
    room = 0.1 * (SIZE / 2048) ** 0.5
    torch.testing.assert_close(moved[:2], torch.full((2,), room), rtol=1e-3, atol=1e-6)
    assert moved[2] == 0


def test_the_loss_of_a_context_counts_older_labels_less():
    labels = text()["input_ids"]
    fields = {"cpt_token_ids": [3, 4, 5, 6], "cpt_tokens_type_mask": [1, 4, 5, 8], "opt_weighted_loss_type": "decay"}
    model = get_peft_model(llama(), peft.CPTConfig(task_type="CAUSAL_LM", opt_loss_decay_factor=0.5, **fields))
    out = model(**text(), labels=labels)
    target = torch.cat([torch.tensor([[3, 4, 5, 6]] * 2), labels], 1)[:, 1:]
    each = nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), target, reduction="none")
    weight = torch.tensor([0.25, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])  # types 4, 5, 8, then 12 for the text
    torch.testing.assert_close(out.loss, (each * weight).sum() / 14)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=2)), ValueError, "needs a task_type"),
    (lambda: get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM")), ValueError, "num_virtual_tokens"),
    (lambda: config("prompt", prompt_tuning_init="TEXTS"), ValueError, "Did you mean 'TEXT'"),
    (lambda: config("prompt", prompt_tuning_init="TEXT"), ValueError, "tokenizer_name_or_path can't be None"),
    (lambda: config("cpt", "SEQ_CLS"), ValueError, "CAUSAL_LM"),
    (lambda: config("cpt", cpt_mask=[1]), ValueError, "as many"),
    (lambda: made("multitask")(**text()), ValueError, "task_ids is missing"),
    (lambda: made("multitask")(**text(), task_ids=torch.tensor([0, 3])), ValueError, "0 to 2"),
    (lambda: made("multitask")(**text(), task_ids=torch.tensor([0])), ValueError, "2 samples"),
    (lambda: made("prompt")(attention_mask=torch.ones(2, 5)), ValueError, "input_ids or inputs_embeds"),
    (lambda: made("prompt")(**text(), adapter_names=["default", "defalt"]), ValueError, "Did you mean 'default'"),
    (lambda: made("prompt")(**text(), adapter_names=["default"] * 3), ValueError, "3 entries.*2 samples"),
    (lambda: made("prompt").merge_and_unload(), NotImplementedError, "changes no weight"),
    (lambda: made("prompt").set_adapter("other"), ValueError, "no adapter 'other'"),
    (lambda: get_peft_model(nn.Linear(2, 2), config("prompt", "FEATURE_EXTRACTION")), ValueError, "num_layers"),
    (lambda: made("p-tuning", encoder_reparameterization_type="GRU"), ValueError, "'LSTM'"),
]


@pytest.mark.parametrize("act, kind, words", REFUSED)
def test_what_cannot_be_is_refused_by_name(act, kind, words):
    with pytest.raises(kind, match=words):
        act()


def test_a_loss_without_labels_says_so():
    model = get_peft_model(llama(), config("cpt", cpt_tokens_type_mask=[1, 2, 3]))
    with pytest.warns(peft.PeftWarning, match="no word of the batch counts as a label"):
        assert model(**text(), labels=text()["input_ids"]).loss == 0


def test_a_tensor_of_a_file_that_has_no_place_is_named(tmp_path):
    made("prompt").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.warns(peft.UnexpectedTensorsWarning, match=r"base_model\.extra\.weight"):
        made("prompt").load_adapter(tmp_path, "default")
    with pytest.raises(peft.PeftError, match=r"base_model\.extra\.weight"):
        made("prompt").load_adapter(tmp_path, "default", strict=True)


def test_a_failed_start_leaves_the_model_as_it_was():
    base = llama()
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM"))
    assert [p.requires_grad for p in base.parameters()] == flags


def test_a_file_of_another_size_is_refused_and_nothing_is_written(tmp_path):
    made("prompt").save_pretrained(tmp_path)
    model = made("prompt", num_virtual_tokens=4)
    before = get_peft_model_state_dict(model)["prompt_embeddings"]
    with pytest.raises(RuntimeError, match=r"\(3, 16\) in the file, \(4, 16\) here"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(before, get_peft_model_state_dict(model)["prompt_embeddings"])


def test_the_network_of_a_prefix_is_as_wide_as_the_keys_if_not_stated():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K, prefix_projection=True)
    encoder = get_peft_model(llama(), config).prompt_encoder["default"]
    assert config.encoder_hidden_size == config.token_dim == SIZE // 2  # two of four heads have keys
    assert encoder.transform[0].weight.shape == (SIZE // 2, SIZE // 2)


class Logits(nn.Module):
    """A model by the names of its arguments, as graphs name sizes."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, *task_ids: Tensor) -> Tensor:
        more = {"task_ids": task_ids[0]} if task_ids else {}
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated", "ignore:The tensor attributes")
@pytest.mark.parametrize("way", ["exported", "traced"])
@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_and_traces_serve_any_number_of_samples(name, way):
    model = Logits(made(name, "gpt2")).eval()

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        ids = torch.arange(batch * length).view(batch, length) % 20
        return ids, torch.ones_like(ids), *tasks(name, batch).values()

    with torch.no_grad():
        if way == "traced":
            run = torch.jit.trace(model, inputs(3, 6))
        else:
            rows, length = Dim("rows", min=1, max=64), Dim("length", min=2, max=64)
            sizes = ({0: rows, 1: length}, {0: rows, 1: length}, *([({0: rows},)] if tasks(name) else []))
            run = export(model, inputs(3, 6), dynamic_shapes=sizes).module()
        for given in (inputs(3, 6), inputs(1, 4), inputs(5, 9)):
            torch.testing.assert_close(run(*given), model(*given))
