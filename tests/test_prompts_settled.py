"""Ways to decode that need the text as ids, with a prompt in front of it."""

from __future__ import annotations

import pytest
import torch

import peft
from peft import get_peft_model
from test_prompts_generation import LLAMA, T5, K, base, ids, prompted

transformers = pytest.importorskip("transformers")


def draft():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})).eval()


PROPOSING = {
    "another model": lambda model: {"assistant_model": draft()},
    "the base": lambda model: {"assistant_model": base("llama")},
    "the same": lambda model: {"assistant_model": model},
    "the text": lambda model: {"prompt_lookup_num_tokens": 3},
    "early layers": lambda model: {"assistant_early_exit": 1},
    "a configuration": lambda model: {
        "generation_config": transformers.GenerationConfig(prompt_lookup_num_tokens=2, max_new_tokens=8, pad_token_id=0)
    },
}


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "cpt", "prefix"])
@pytest.mark.parametrize("who", PROPOSING)
def test_proposed_tokens_change_nothing(method, who):
    model = prompted("llama", method)
    for text in ids(rows=2, length=7).split(1):
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(text, **settings)
        more = PROPOSING[who](model)
        assert torch.equal(model.generate(text, **({} if who == "a configuration" else settings), **more), expected)
        assert torch.equal(model.generate(text, **settings), expected)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_a_padded_text_is_no_text_to_propose_for(method):
    model, text = prompted("llama", method), ids(rows=1)
    with pytest.raises(ValueError, match="may not be padded"):
        model.generate(text, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_the_texts_own_tokens_are_penalised(method, beams, recwarn):
    model, text = prompted("llama", method), ids(rows=2, length=8)
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    found = model.generate(text, encoder_repetition_penalty=1e6, eos_token_id=None, **settings)  # the text's only
    assert all(set(row[8:].tolist()) <= set(row[:8].tolist()) for row in found)
    assert not [w for w in recwarn if "encoder_repetition_penalty" in str(w.message)]
    off = model.generate(text, encoder_repetition_penalty=1.0, **settings)
    assert torch.equal(off, model.generate(text, **settings))


def test_what_the_encoder_shows_is_returned_behind_a_prefix():
    torch.manual_seed(0)
    plain = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    asked = dict.fromkeys(("return_dict_in_generate", "output_attentions", "output_hidden_states"), True)
    expected = plain.generate(input_ids=ids(), max_new_tokens=3, **asked)
    model = get_peft_model(plain, peft.PrefixTuningConfig(num_virtual_tokens=K, task_type="SEQ_2_SEQ_LM")).eval()
    found = model.generate(input_ids=ids(), max_new_tokens=3, **asked)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["encoder_hidden_states"], expected["encoder_hidden_states"])
    assert len(found["encoder_attentions"]) == len(expected["encoder_attentions"])


@pytest.mark.parametrize(
    ("cache", "more", "text"),
    [
        (None, {"prompt_lookup_num_tokens": 2}, "In transformers 4, assisted generation.*Install transformers 5"),
        (list, {}, "Before transformers 4.54.*or use prompt tuning"),
    ],
    ids=["assisted", "old caches"],
)
def test_what_older_releases_would_count_wrong_is_refused(cache, more, text, monkeypatch):
    model = prompted("llama", "prefix")
    model.get_base_model().__dict__["_get_initial_cache_position"] = None  # what transformers 5 no longer has
    if cache is not None:
        monkeypatch.setattr("peft.prompts.generating.empty_cache", lambda config: cache())
    with pytest.raises(ValueError, match=text):
        model.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=2, **more)
