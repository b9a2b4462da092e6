"""Prompts with every task's head: classification of texts and tokens, questions, features, encoder-decoders."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy

import peft
from peft import PeftModel, get_peft_model

transformers = pytest.importorskip("transformers")

K, WORDS = 3, 40
BERT = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
T5 = {
    "vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
BART = {
    "vocab_size": WORDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": None,
    "forced_eos_token_id": None,
}  # fmt: skip
TASKS = {
    "SEQ_CLS": "BertForSequenceClassification",
    "TOKEN_CLS": "BertForTokenClassification",
    "QUESTION_ANS": "BertForQuestionAnswering",
    "FEATURE_EXTRACTION": "BertModel",
}
METHODS = {
    "prompt_tuning": ("PromptTuningConfig", {}),
    "p_tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 2}),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix_projection": ("PrefixTuningConfig", {"prefix_projection": True}),
}
IN_FRONT = ("prompt_tuning", "p_tuning", "multitask")
CACHES = ("prefix", "prefix_projection")
each_task = pytest.mark.parametrize("task", TASKS)
each_method = pytest.mark.parametrize("method", METHODS)
each_pair = pytest.mark.parametrize("family", ["t5", "bart"])


def base(task: str):
    torch.manual_seed(0)
    return getattr(transformers, TASKS[task])(
        transformers.BertConfig(**BERT, num_labels=2 if task == "QUESTION_ANS" else 3)
    ).eval()


def pair(family: str):
    torch.manual_seed(0)
    if family == "t5":
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)).eval()


def config(method: str, task: str, **more):
    name, kwargs = METHODS[method]
    return getattr(peft, name)(task_type=task, num_virtual_tokens=K, **kwargs, **more)


def prompted(model, method: str, task: str, **more) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(model, config(method, task, **more)).eval()
    with torch.no_grad():
        for p in model.prompt_encoder["default"].parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tasks(method: str, rows: int = 2):
    return {"task_ids": torch.arange(rows) % 2} if method == "multitask" else {}


def ids(rows: int = 2, length: int = 5, seed: int = 3):
    return torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def first(out):
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits])
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def labels_of(task: str, length: int = 5):
    if task == "SEQ_CLS":
        return {"labels": torch.tensor([0, 2])}
    if task == "TOKEN_CLS":
        return {"labels": torch.arange(2 * length).view(2, length) % 3}
    return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}


@each_task
@pytest.mark.parametrize("method", IN_FRONT)
@torch.no_grad()
def test_the_forward_is_that_of_embeddings_side_by_side(task, method):
    model, text = prompted(base(task), method, task), ids()
    kinds = torch.tensor([[0, 0, 1, 1, 1]]).expand(2, -1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    made = model.prompt_encoder["default"].prompt(2, **tasks(method))
    plain = model.get_base_model()
    wanted = first(plain(
        inputs_embeds=torch.cat([made, plain.get_input_embeddings()(text)], 1),
        attention_mask=torch.cat([torch.ones(2, K, dtype=torch.long), mask], 1),
        token_type_ids=torch.cat([torch.zeros(2, K, dtype=torch.long), kinds], 1),
    ))  # fmt: skip
    found = first(model(input_ids=text, attention_mask=mask, token_type_ids=kinds, **tasks(method)))
    torch.testing.assert_close(found, wanted)
    again = model(input_ids=text, attention_mask=mask.bool(), token_type_ids=kinds, **tasks(method))
    torch.testing.assert_close(first(again), wanted)
    moved = model(
        input_ids=text, attention_mask=mask, token_type_ids=kinds, position_ids=torch.arange(5)[None], **tasks(method)
    )
    torch.testing.assert_close(first(moved), wanted)


def of_another_release(model, task: str, name: str | None):
    """The model with the forward of another release of transformers: the cache has this name, or no name."""
    own = type(model).forward
    if name and not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(own).parameters.values()):
        pytest.skip("heads of transformers 4 hand no cache on")

    def later(self, input_ids=None, attention_mask=None, cache=None, **kwargs):
        return own(self, input_ids, attention_mask, past_key_values=cache, **kwargs)

    def earlier(self, input_ids=None, attention_mask=None, labels=None, return_dict=None):
        return own(self, input_ids, attention_mask)

    model.__class__ = type(type(model).__name__, (type(model),), {"forward": later if name else earlier})
    return model


@pytest.mark.parametrize("name", ["cache", None])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("method", CACHES)
@torch.no_grad()
def test_a_prefix_enters_forwards_of_other_releases(task, method, name):
    wanted = first(prompted(base(task), method, task)(ids()))
    model = prompted(of_another_release(base(task), task, name), method, task)
    assert torch.equal(first(model(ids())), wanted)
    assert not torch.equal(first(model.get_base_model()(ids())), wanted)


@each_task
@pytest.mark.parametrize("method", CACHES)
@torch.no_grad()
def test_a_prefix_gives_every_layer_keys_and_values(task, method):
    """Attention is written out here, in place of the model's own."""
    model, text = prompted(base(task), method, task), ids()
    plain = model.get_base_model()
    entries = model.prompt_encoder["default"].prompt(2).view(2, K, 4, 2, 8).permute(2, 0, 3, 1, 4)
    bert = getattr(plain, "bert", plain)
    at = torch.arange(K, K + text.shape[1]).expand(len(text), -1)
    x = bert.embeddings(input_ids=text, position_ids=at)
    for i, layer in enumerate(bert.encoder.layer):
        own = layer.attention.self
        q, k, v = (f(x).view(2, 5, 2, 8).transpose(1, 2) for f in (own.query, own.key, own.value))
        k, v = torch.cat([entries[2 * i], k], 2), torch.cat([entries[2 * i + 1], v], 2)
        mixed = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 16)
        x = layer.attention.output(mixed, x)
        x = layer.output(layer.intermediate(x), x)
    if task == "SEQ_CLS":
        wanted = plain.classifier(bert.pooler(x))
    elif task == "TOKEN_CLS":
        wanted = plain.classifier(x)
    else:
        wanted = plain.qa_outputs(x).permute(2, 0, 1) if task == "QUESTION_ANS" else x
    found = first(model(input_ids=text, attention_mask=torch.ones_like(text)))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    again = first(model(input_ids=text))
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", [t for t in TASKS if t != "FEATURE_EXTRACTION"])
@each_method
def test_the_loss_is_that_of_the_text_and_trains_prompt_and_head(task, method):
    model, text = prompted(base(task), method, task), ids()
    given = labels_of(task)
    out = model(input_ids=text, attention_mask=torch.ones_like(text), **given, **tasks(method))
    if task == "SEQ_CLS":
        wanted = cross_entropy(out.logits, given["labels"])
    elif task == "TOKEN_CLS":
        wanted = cross_entropy(out.logits[:, -5:].flatten(0, 1), given["labels"].flatten())
    else:
        wanted = (
            cross_entropy(out.start_logits, given["start_positions"])
            + cross_entropy(out.end_logits, given["end_positions"])
        ) / 2
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("prompt_encoder.default.") for n in trained)
    assert any(".modules_to_save.default." in n for n in trained)
    assert all("prompt_encoder" in n or ".modules_to_save.default." in n for n in trained)


@each_task
@each_method
@torch.no_grad()
def test_head_and_prompt_are_saved_and_loaded(task, method, tmp_path):
    plain = base(task)
    model, text = prompted(base(task), method, task), ids()
    for n, p in model.named_parameters():
        if ".modules_to_save.default." in n:
            p.add_(1.0)
    wanted = first(model(input_ids=text, **tasks(method)))
    model.save_pretrained(tmp_path)
    keys = set(peft.load_peft_weights(str(tmp_path)))
    assert "prompt_embeddings" in keys
    head = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}.get(task)
    assert head is None or {f"base_model.{head}.weight", f"base_model.{head}.bias"} <= keys
    again = PeftModel.from_pretrained(base(task), tmp_path)
    torch.testing.assert_close(first(again(input_ids=text, **tasks(method))), wanted, atol=1e-6, rtol=1e-6)
    with again.disable_adapter():
        assert torch.equal(first(again(input_ids=text)), first(plain(input_ids=text)))
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    torch.testing.assert_close(first(model(input_ids=text, **tasks(method))), wanted, atol=1e-6, rtol=1e-6)


def whole(model, method, text, mask, decoder):
    """The logits of an encoder-decoder from inputs made here."""
    plain, encoder = model.get_base_model(), model.prompt_encoder["default"]
    made = encoder.prompt(len(text), **tasks(method, len(text)))
    if method in IN_FRONT:
        embedded = torch.cat([made[:, :K], plain.get_input_embeddings()(text)], 1)
        mask = torch.cat([mask.new_ones(len(text), K), mask], 1)
        return plain(inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=decoder).logits
    entries = made.view(len(text), K, 4, 2, 8).permute(2, 0, 3, 1, 4)
    own = transformers.DynamicCache()
    for i in range(2):
        own.update(entries[4 * i % 4], entries[(4 * i + 1) % 4], i)
    cache = transformers.EncoderDecoderCache(own, transformers.DynamicCache())
    reach = torch.ones(len(text), K + decoder.shape[1], dtype=torch.long)
    return plain(
        input_ids=text, attention_mask=mask, decoder_input_ids=decoder, decoder_attention_mask=reach,
        past_key_values=cache,
    ).logits  # fmt: skip


@each_pair
@pytest.mark.parametrize("method", [m for m in METHODS if m != "multitask"])
@torch.no_grad()
def test_an_encoder_decoder_computes_and_generates_as_by_hand(family, method):
    model, text = prompted(pair(family), method, "SEQ_2_SEQ_LM"), ids()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    start = model.config.decoder_start_token_id
    decoder = torch.tensor([[start, 7, 8], [start, 9, 4]])
    found = model(input_ids=text, attention_mask=mask, decoder_input_ids=decoder).logits
    torch.testing.assert_close(found, whole(model, method, text, mask, decoder), atol=1e-5, rtol=1e-5)
    grown = torch.full((2, 1), start)
    for _ in range(5):
        logits = whole(model, method, text, mask, grown)[:, -1:]
        grown = torch.cat([grown, logits.argmax(-1)], 1)
    more = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(input_ids=text, attention_mask=mask, **more), grown)
    beams = model.generate(input_ids=text, attention_mask=mask, num_beams=3, num_return_sequences=2, **more)
    assert beams.shape == (4, 6)
    assert model.generate(input_ids=text, do_sample=True, max_new_tokens=4).shape == (2, 5)


@each_pair
@each_method
def test_an_encoder_decoder_trains_its_prompt_only_and_is_saved(family, method, tmp_path):
    model, text = prompted(pair(family), method, "SEQ_2_SEQ_LM"), ids()
    labels = ids(2, 4, 9)
    out = model(input_ids=text, labels=labels, **tasks(method))
    out.loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all(n.startswith("prompt_encoder.default.") for n in trained)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pair(family), tmp_path)
    with torch.no_grad():
        found = again(input_ids=text, labels=labels, **tasks(method))
        torch.testing.assert_close(found.loss, out.loss.detach())
        generated = model.generate(input_ids=text, max_new_tokens=3, do_sample=False, **tasks(method))
        assert torch.equal(
            again.generate(input_ids=text, max_new_tokens=3, do_sample=False, **tasks(method)), generated
        )
        with model.disable_adapter():
            plain = pair(family).generate(input_ids=text, max_new_tokens=3, do_sample=False)
            assert torch.equal(model.generate(input_ids=text, max_new_tokens=3, do_sample=False), plain)


@each_pair
@each_method
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}], ids=str)
def test_generation_answers_as_the_forward_that_was_trained(family, method, more):
    """Also the tokens that stand in front of the decoder's text."""
    model = prompted(pair(family), method, "SEQ_2_SEQ_LM")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    text = torch.arange(3, 15).view(2, 6)
    shown = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None, "do_sample": False}
    made = model.generate(input_ids=text, max_new_tokens=3, **shown, **more, **tasks(method))
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        wanted = model(input_ids=text, decoder_input_ids=start, **tasks(method)).logits[:, -1]
        torch.testing.assert_close(made.logits[0][:: more.get("num_beams", 1)], wanted, rtol=1e-4, atol=1e-5)
        if not more:
            wanted = model(input_ids=text, decoder_input_ids=made.sequences[:, :-1], **tasks(method)).logits[:, -1]
            torch.testing.assert_close(made.logits[-1], wanted, rtol=1e-4, atol=1e-5)


@each_method
def test_generation_of_a_mixed_batch_is_right_or_refused(method):
    """BART's positions cannot be set, so that the text of a sample without a prompt would stand behind it."""
    names, text = ["__base__", "default"], torch.arange(3, 15).view(2, 6)
    fields = {"max_new_tokens": 3, "eos_token_id": None, "do_sample": False}
    with pytest.raises(ValueError, match="takes no position_ids"):
        prompted(pair("bart"), method, "SEQ_2_SEQ_LM").generate(
            input_ids=text, adapter_names=names, **fields, **tasks(method)
        )
    model = prompted(pair("t5"), method, "SEQ_2_SEQ_LM")
    made = model.generate(input_ids=text, adapter_names=names, **fields, **tasks(method))
    assert torch.equal(made[1], model.generate(input_ids=text, **fields, **tasks(method))[1])
    with model.disable_adapter():
        assert torch.equal(made[0], model.generate(input_ids=text, **fields)[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_task_type_is_needed(method):
    with pytest.raises((ValueError, KeyError), match="task_type"):
        get_peft_model(base("SEQ_CLS"), config(method, None))


OPT = {
    "vocab_size": WORDS, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "word_embed_proj_dim": 16,
}  # fmt: skip
PLACES = {  # how models count positions: behind padding's, by the mask, not at all
    "roberta": ("RobertaForTokenClassification", "RobertaConfig", {**BERT, "pad_token_id": 1}, "TOKEN_CLS"),
    "mpnet": ("MPNetForTokenClassification", "MPNetConfig", {**BERT, "pad_token_id": 1}, "TOKEN_CLS"),
    "bert": ("BertForTokenClassification", "BertConfig", BERT, "TOKEN_CLS"),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, "CAUSAL_LM"),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, "SEQ_2_SEQ_LM"),
}


@each_method
@pytest.mark.parametrize("family", PLACES)
def test_rows_of_a_mixed_batch_have_the_positions_that_they_have_alone(family, method):
    kind, settings, sizes, task = PLACES[family]
    if family == "mpnet" and method in CACHES:
        pytest.skip("it takes no cache")
    torch.manual_seed(0)
    bare = getattr(transformers, kind)(getattr(transformers, settings)(**sizes)).eval()
    name, fields = METHODS[method]
    model = get_peft_model(bare, getattr(peft, name)(task_type=task, num_virtual_tokens=K, **fields))
    targets = ["q"] if family in ("t5", "mpnet") else ["q_proj"] if family == "opt" else ["query"]
    model.add_adapter("other", peft.LoraConfig(task_type=task, target_modules=targets, init_lora_weights=False))
    ids = torch.arange(3, 24).view(3, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0 if family in ("opt", "t5") else 1  # padding on the left
    given = {"input_ids": ids, "attention_mask": mask}
    given |= {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
    tasks, model = {"task_ids": torch.tensor([0, 1, 0])} if method == "multitask" else {}, model.eval()
    for names in (["default", "other", "__base__"], ["other", "default", "other"], ["__base__", "__base__", "default"]):
        with torch.no_grad():
            found = model(**given, **tasks, adapter_names=names).logits
            for i, one in enumerate(names):
                model.set_adapter("other" if one == "__base__" else one)
                with model.disable_adapter() if one == "__base__" else torch.no_grad():
                    alone = model(**given, **(tasks if one == "default" else {})).logits
                last = 4 if family == "t5" else int(mask[i].sum())
                torch.testing.assert_close(found[i, -last:], alone[i, -last:], rtol=1e-4, atol=1e-5)
