"""Cartridges and prefixes that start from the cache of a text, and cartridges joined in a file."""

from __future__ import annotations

import warnings

import pytest
import torch

import peft
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

transformers = pytest.importorskip("transformers")

K, WORDS = 4, 40


def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def cartridge(tokens: int = K, **more) -> PeftModel:
    return get_peft_model(base(), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **more)).eval()


def prefix(**more) -> PeftModel:
    return get_peft_model(base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K, **more)).eval()


class Letters:
    """A tokenizer: each letter is a word."""

    chat_template = None

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[3 + ord(c) % 32 for c in text]])}


class Chat(Letters):
    """A tokenizer with a template that puts a word in front; it may refuse."""

    chat_template = "yes"

    def __init__(self, refuses: bool = False):
        self.refuses = refuses

    def apply_chat_template(self, messages, **options):
        assert messages == [{"role": "system", "content": messages[0]["content"]}]
        if self.refuses:
            raise RuntimeError("no system messages")
        return {"input_ids": torch.cat([torch.tensor([[1]]), self(messages[0]["content"], "pt")["input_ids"]], 1)}


@pytest.mark.parametrize("make", [cartridge, prefix])
@pytest.mark.parametrize("tokenizer", [Letters(), Chat()])
@torch.no_grad()
def test_a_prompt_made_of_a_text_is_that_text(make, tokenizer):
    """The first k tokens of a text are the same context as keys and values as in front of the ids."""
    model, text, more = make(), "abcdefgh", torch.tensor([[9, 8, 7]])
    model.train()
    made = peft.initialize_kv_prefix_from_text(model, tokenizer, text=text)
    assert model.training and model.get_base_model().model.layers[0].training, "the mode is restored"
    assert made.shape == (K, 2 * 2 * 16 // 2) and torch.equal(model.get_prompt_embedding_to_save("default"), made)
    ids = tokenizer(text, "pt")["input_ids"]
    context = (torch.cat([torch.tensor([[1]]), ids], 1) if tokenizer.chat_template else ids)[:, :K]
    wanted = base()(input_ids=torch.cat([context, more], 1)).logits[:, K:]
    model.eval()
    torch.testing.assert_close(model(input_ids=more).logits, wanted)
    shorter = peft.initialize_kv_prefix_from_text(model, tokenizer, text=text, max_length=K)
    torch.testing.assert_close(shorter, made)


@torch.no_grad()
def test_a_text_longer_than_the_window_of_attention_gives_its_first_tokens():
    config = transformers.MistralConfig(**{**base().config.to_dict(), "model_type": "mistral", "sliding_window": K + 1})
    torch.manual_seed(0)
    plain = transformers.MistralForCausalLM(config).eval()
    model = get_peft_model(plain, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K)).eval()
    made = peft.initialize_kv_prefix_from_text(model, Letters(), text="abcdefghijkl")
    with model.disable_adapter():
        cache = model(input_ids=Letters()("abcd", "pt")["input_ids"], use_cache=True).past_key_values
    assert torch.equal(made, peft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=K))


def test_a_template_that_refuses_says_so_and_the_text_is_taken_as_it_is():
    model = cartridge()
    with pytest.warns(peft.PeftWarning, match="no system messages"):
        found = peft.initialize_kv_prefix_from_text(model, Chat(refuses=True), text="abcdefgh")
    plain = peft.initialize_kv_prefix_from_text(model, Chat(), text="abcdefgh", use_chat_template=False)
    assert torch.equal(found, plain)


def test_caches_in_all_forms_give_the_same_prompt():
    ids = torch.arange(3, 9)[None]
    cache = base()(input_ids=ids, use_cache=True).past_key_values
    whole = peft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=K)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    assert torch.equal(peft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=K), whole)
    both = transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
    assert torch.equal(peft.prompt_embeddings_from_past_key_values(both, num_virtual_tokens=K), whole)
    for i, (keys, values) in enumerate(pairs):
        entries = whole.view(K, 4, 2, 4)
        assert torch.equal(entries[:, 2 * i], keys[0].transpose(0, 1)[:K])
        assert torch.equal(entries[:, 2 * i + 1], values[0].transpose(0, 1)[:K])


@pytest.mark.parametrize(
    ("cache", "error", "says"),
    [
        ([], ValueError, "is empty"),
        (3, TypeError, "int"),
        ([3], TypeError, "int"),
        (transformers.DynamicCache(), ValueError, "is empty"),
        ([(torch.zeros(2, 2, 6, 4),) * 2], ValueError, "batch of 2"),
        ([(torch.zeros(1, 2, 3, 4),) * 2], ValueError, "holds 3 tokens"),
        ([(torch.zeros(1, 2, 6, 4),) * 2, (torch.zeros(1, 1, 6, 4),) * 2], ValueError, "layer 1"),
        ([(torch.zeros(2, 6, 4),) * 2], ValueError, "layer 0"),
    ],
)
def test_what_is_no_cache_of_one_text_says_so(cache, error, says):
    with pytest.raises(error, match=says):
        peft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=K)


def test_other_methods_and_names_say_so():
    cache = base()(input_ids=torch.arange(3, 9)[None], use_cache=True).past_key_values
    start = peft.initialize_kv_prefix_from_past_key_values
    other = get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K))
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        start(other, past_key_values=cache)
    with pytest.raises(ValueError, match="prefix_projection"):
        start(prefix(prefix_projection=True), past_key_values=cache)
    with pytest.raises(ValueError, match=r"'defualt'.*'default'"):
        start(cartridge(), past_key_values=cache, adapter_name="defualt")
    with pytest.raises(ValueError, match=r"\(4, 32\)"):
        start(cartridge(), past_key_values=cache, num_virtual_tokens=3)


def test_frozen_tokens_stay_and_numbers_that_cannot_be_say_so():
    model = cartridge(num_frozen_tokens=3)
    encoder = model.prompt_encoder["default"]
    assert encoder.frozen_embedding.shape == (3, 32) and not encoder.frozen_embedding.requires_grad
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert encoder.trainable_embedding.grad.any() and encoder.frozen_embedding.grad is None
    assert cartridge(num_frozen_tokens=0).prompt_encoder["default"].frozen_embedding is None
    for wrong in (-1, K + 1, 1.5):
        with pytest.raises(ValueError, match="num_frozen_tokens"):
            CartridgeConfig(num_virtual_tokens=K, num_frozen_tokens=wrong)


@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_joined_cartridges_stand_one_after_the_other(tmp_path, safe):
    models = [cartridge(2), cartridge(3)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    peft.compose_cartridge_adapters(
        [tmp_path / "0", tmp_path / "1"], output_path=tmp_path / "both", safe_serialization=safe
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", peft.PeftWarning)  # a pickle
        both = PeftModel.from_pretrained(base(), tmp_path / "both")
    parts = [m.get_prompt_embedding_to_save("default") for m in models]
    assert torch.equal(both.get_prompt_embedding_to_save("default"), torch.cat(parts))
    assert both.peft_config["default"].num_virtual_tokens == 5
    with pytest.raises(ValueError, match="two or more"):
        peft.compose_cartridge_adapters([tmp_path / "0"], output_path=tmp_path / "one")
    prefix().save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match="PREFIX_TUNING"):
        peft.compose_cartridge_adapters([tmp_path / "0", tmp_path / "prefix"], output_path=tmp_path / "mix")
    with pytest.raises(ValueError, match="num_layers=3, not 2"):
        config = peft.PeftConfig.from_pretrained(tmp_path / "1")
        config.num_layers = 3
        config.save_pretrained(tmp_path / "1")
        peft.compose_cartridge_adapters([tmp_path / "0", tmp_path / "1"], output_path=tmp_path / "mix")
    assert not (tmp_path / "mix").exists() and not (tmp_path / "one").exists()


def test_names_are_where_client_code_looks():
    from peft.tuners.cartridge import CartridgeEncoder
    from peft.tuners.cartridge.config import CartridgeConfig as Config
    from peft.tuners.cartridge.model import CartridgeEncoder as Encoder
    from peft.tuners.cartridge.utils import compose_cartridge_adapters

    assert Config is CartridgeConfig and Encoder is CartridgeEncoder
    assert compose_cartridge_adapters is peft.compose_cartridge_adapters
