"""`generate` of adapted models: every way to decode and every cache against the model with the adapter merged."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch

import peft
from peft import LoraConfig, get_peft_model

from .tiny import IDS, TARGETS, VOCABULARY, llama, llama_config, moved, seeded, tokenizer

transformers = pytest.importorskip("transformers", "4.57")

LEFT = torch.tensor([[0, 0, 3, 4, 5, 6], [7, 8, 9, 3, 4, 11]])  # the first line is shorter
MASK = (LEFT != 0).long()
pytestmark = pytest.mark.filterwarnings("ignore:.*contrastive")


def greedy_by_hand(model: Any, input_ids: torch.Tensor, generation_config: Any = None, **kwargs: Any) -> torch.Tensor:
    """A loop of the user's own, as `custom_generate` calls it."""
    ids = input_ids
    for _ in range(5):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def no_sevens(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.index_fill(1, torch.tensor([7]), -float("inf"))


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "several beams each": {"num_beams": 4, "num_return_sequences": 2},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "several samples each": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "processors": {"logits_processor": [no_sevens]},
    "looking up the prompt": {"prompt_lookup_num_tokens": 2},
    "early exit": {"assistant_early_exit": 1},
    "a loop of one's own": {"custom_generate": greedy_by_hand},
    "without a cache": {"use_cache": False},
}
ONE_LINE = {"looking up the prompt", "early exit"}
METHODS = {
    "lora": LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", use_dora=True),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "head and tokens": LoraConfig(
        r=2, target_modules=TARGETS, task_type="CAUSAL_LM", modules_to_save=["lm_head"], trainable_token_indices=[3, 5]
    ),
}


def pair(method: str = "lora", **changes: Any) -> tuple[Any, Any]:
    """An adapted model, and the plain one that it becomes when it is merged."""
    torch.manual_seed(0)
    model = moved(get_peft_model(llama(**changes), copy.deepcopy(METHODS[method])), size=0.4)
    return model, copy.deepcopy(model).merge_and_unload()


def mistral(window: int) -> Any:
    """A model whose layers look back a few tokens only."""
    settings = {**llama_config(initializer_range=0.3).to_dict(), "sliding_window": window, "model_type": "mistral"}
    return seeded(transformers.MistralForCausalLM, transformers.MistralConfig(**settings))


def run(model: Any, ids: torch.Tensor = IDS, **options: Any) -> Any:
    torch.manual_seed(4)
    plain = "custom_generate" in options
    more = {} if plain else {"return_dict_in_generate": True, "output_logits": True}
    options = {k: copy.deepcopy(v) if k == "cache_config" else v for k, v in options.items()}  # 4.57 empties it
    out = model.generate(input_ids=ids, pad_token_id=0, max_new_tokens=8, **more, **options)
    return (out, ()) if plain else (out.sequences, out.logits)


def check(model: Any, merged: Any, ids: torch.Tensor = IDS, within: float = 1e-4, **options: Any) -> torch.Tensor:
    found, expected = run(model, ids, **options), run(merged, ids, **options)
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=within, atol=within)
    return found[0]


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_decode_gives_what_the_merged_model_gives(mode):
    model, merged = pair()
    found = check(model, merged, IDS[:1] if mode in ONE_LINE else IDS, **MODES[mode])
    with model.disable_adapter():
        assert not torch.equal(run(model, IDS[:1] if mode in ONE_LINE else IDS, **MODES[mode])[0], found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_methods_decode_as_merged(method, mode):
    check(*pair(method), LEFT, attention_mask=MASK, **MODES[mode])


@pytest.mark.parametrize("adapted", ["the model", "the assistant", "both", "the same, disabled"])
def test_a_smaller_model_proposes_and_the_adapted_one_decides(adapted):
    model, merged = pair()
    draft, plain_draft = pair("ia3", num_hidden_layers=1)
    ids, more = IDS[:1], {"max_new_tokens": 8, "pad_token_id": 0}
    alone = merged.generate(ids, **more)
    helper = draft if adapted in ("the assistant", "both") else plain_draft
    if adapted == "the same, disabled":
        helper = llama()
    with_helper = (merged if adapted == "the assistant" else model).generate(ids, assistant_model=helper, **more)
    assert torch.equal(with_helper, alone)


@pytest.mark.parametrize("mode", ["group_beam", "contrastive", "dola", "constrained"])
def test_ways_that_moved_to_the_hub_say_so_alike(mode):
    options = {
        "group_beam": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
        "dola": {"dola_layers": "low"},
        "constrained": {"force_words_ids": [[5]], "num_beams": 3},
    }[mode]
    answers = []
    for model in pair():
        try:
            answers.append(run(model, IDS[:1], **options)[0].tolist())
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    assert answers[0] == answers[1]


# ---- caches --------------------------------------------------------------------------------------------------------

has_hqq = importlib.util.find_spec("hqq") is not None
CACHES = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded static": {"cache_implementation": "offloaded_static"},
    "quantised": {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "hqq", "nbits": 4, "residual_length": 4, "axis_key": 1, "axis_value": 1},
    },
}
ON_A_GPU = {"offloaded", "offloaded static"}


@pytest.mark.parametrize("mode", ["greedy", "beams", "sampling"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sliding", [False, True], ids=["whole", "sliding"])
def test_every_cache_gives_what_the_merged_model_gives(sliding, cache, mode):
    if cache in ON_A_GPU and not torch.cuda.is_available():
        pytest.skip("moves keys and values to and from a GPU, and there is none")
    if cache == "quantised" and (not has_hqq or mode == "beams" or sliding):
        pytest.skip("needs hqq; has neither beams nor windows")
    size = {"hidden_size": 64, "intermediate_size": 32} if cache == "quantised" else {}
    model, merged = pair(**size)
    if sliding:
        model = moved(get_peft_model(mistral(4), METHODS["lora"]), size=0.4)
        merged = copy.deepcopy(model).merge_and_unload()
    options = {**CACHES[cache], **MODES[mode], "min_new_tokens": 8}
    ids = IDS if cache == "quantised" else LEFT
    found = check(model, merged, ids, attention_mask=(ids != 0).long(), **options)
    assert found.shape[1] == ids.shape[1] + 8


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_a_cache_is_handed_in_and_used_again(kind):
    model, merged = pair()
    answers = []
    for m in (model, merged):
        limits = {} if kind == "DynamicCache" else {"max_cache_len": 32}
        cache = getattr(transformers, kind)(config=m.config, **limits)
        first = m.generate(IDS, past_key_values=cache, max_new_tokens=4, pad_token_id=0)
        longer = torch.cat([first, IDS], 1)
        answers.append(m.generate(longer, past_key_values=cache, max_new_tokens=4, pad_token_id=0))
    assert torch.equal(*answers)
    fresh = merged.generate(longer, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(answers[0], fresh)


PROMPTS = {
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore:Layers of MistralForCausalLM look back 5 tokens")  # which prefixes do not reach
@pytest.mark.parametrize("mode", ["greedy", "beams", "sampling"])
@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("sliding", [None, 5], ids=["whole", "sliding"])
def test_prompts_decode_alike_in_every_cache(sliding, method, mode):
    base = mistral(sliding) if sliding else llama()
    plain = copy.deepcopy(base)
    model = moved(get_peft_model(base, copy.deepcopy(PROMPTS[method])), size=0.5)
    options = {"attention_mask": MASK, "min_new_tokens": 8, **MODES[mode]}
    found = run(model, LEFT, **options)[0]
    for kind in ("dynamic", "static"):
        assert torch.equal(run(model, LEFT, cache_implementation=kind, **options)[0], found)
        settings = transformers.GenerationConfig(
            cache_implementation=kind,
            max_length=14,
            pad_token_id=0,
            **{k: v for k, v in options.items() if v is not MASK},
        )
        torch.manual_seed(4)
        assert torch.equal(model.generate(LEFT, attention_mask=MASK, generation_config=settings), found)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(run(model, LEFT, **options)[0], found)
    model.generation_config.cache_implementation = None
    with model.disable_adapter():
        off = run(model, LEFT, **options)
    assert not torch.equal(off[1][0], run(model, LEFT, **options)[1][0])
    assert torch.equal(off[0], run(plain, LEFT, **options)[0])


@pytest.mark.skipif(not has_hqq or transformers.__version__.startswith("4."), reason="needs hqq; packs pairs only")
def test_a_prefix_lives_in_a_quantised_cache():
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")  # hqq packs tokens in pairs
    model = moved(get_peft_model(llama(hidden_size=64), prefix), size=0.5)
    rough = run(model, **CACHES["quantised"], min_new_tokens=8)[1]
    fine = run(model, min_new_tokens=8)[1]
    assert 0 < (rough[0] - fine[0]).abs().max() < 0.5 * fine[0].abs().max()
    with pytest.raises(ValueError, match="cache_implementation='stattic'"):
        model.generate(IDS, cache_implementation="stattic")


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_prefix_of_a_decoder_lives_in_a_static_cache(mode):
    model = moved(
        get_peft_model(t5(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")), size=0.5
    )
    found = run(model, **MODES[mode])[0]
    assert torch.equal(run(model, cache_implementation="static", **MODES[mode])[0], found)


# ---- other models, other ways in -----------------------------------------------------------------------------------


def t5() -> Any:
    return seeded(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0,
            initializer_factor=3.0,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "static"])
def test_an_encoder_and_a_decoder(mode):
    options = {"cache_implementation": "static"} if mode == "static" else MODES[mode]
    model = moved(get_peft_model(t5(), LoraConfig(r=2, task_type="SEQ_2_SEQ_LM")), size=0.4)
    check(model, copy.deepcopy(model).merge_and_unload(), within=2e-3, **options)


def test_a_model_that_transformers_adapted_itself():
    model = llama()
    torch.manual_seed(0)
    model.add_adapter(copy.deepcopy(METHODS["lora"]))
    moved(model, size=0.4)
    _, merged = pair()
    for options in (MODES["greedy"], MODES["beams"], CACHES["static"]):
        check(model, merged, **options)


def test_embeddings_are_continued():
    model, merged = pair()
    embeds = merged.get_input_embeddings()(IDS)
    torch.testing.assert_close(model.get_input_embeddings()(IDS), embeds)
    answers = [m.generate(inputs_embeds=embeds, max_new_tokens=6, pad_token_id=0) for m in (model, merged)]
    assert torch.equal(*answers)


def test_words_are_streamed_as_they_come():
    class Kept(transformers.TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    model, merged = pair()
    streamers = []
    for m in (model, merged):
        streamers.append(Kept(tokenizer()))
        m.generate(IDS[:1], streamer=streamers[-1], max_new_tokens=6, pad_token_id=0)
    assert streamers[0].text == streamers[1].text != ""


def test_settings_of_the_base_model_hold():
    model, merged = pair()
    for m in (model, merged):
        m.generation_config.max_new_tokens = 3
        m.generation_config.pad_token_id = 0
    assert torch.equal(model.generate(IDS), merged.generate(IDS))
    assert model.generate(IDS).shape[1] <= IDS.shape[1] + 3
    assert model.can_generate()
