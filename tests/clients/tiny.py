"""Models, tokenizers and data that the clients' tests share: small, made from configurations, the same each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 40
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama_config(**changes: Any) -> Any:
    """The configuration of a Llama of two layers."""
    from transformers import LlamaConfig

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaConfig(**{**sizes, **tokens, "num_key_value_heads": 2, "max_position_embeddings": 64, **changes})


def llama(**changes: Any) -> Any:
    """A Llama with a head, the same at every call; its weights are large enough to tell answers apart."""
    from transformers import LlamaForCausalLM

    return seeded(LlamaForCausalLM, llama_config(initializer_range=0.3, **changes))


def bert_config(**changes: Any) -> Any:
    """The configuration of a BERT of two layers."""
    from transformers import BertConfig

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    return BertConfig(**{**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_labels": 2, **changes})


def seeded(kind: type, config: Any) -> Any:
    """A model from its configuration, the same at every call, in evaluation mode."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        return kind(config).eval()
    finally:
        torch.set_rng_state(state)


def tokenizer() -> Any:
    """One word, one number: "w3 w4" is [3, 4]."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def moved(model: nn.Module, seed: int = 1, size: float = 0.1) -> Any:
    """The model in evaluation mode, its trainable parameters moved a little, the same way for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """What a model answers to token numbers."""
    return model(input_ids=ids).logits


def tensors(folder: Path | str) -> dict[str, Tensor]:
    """The tensors of an adapter's folder."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states have the same names and the very same numbers."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def calls(owner: Any, name: str) -> Iterator[list[tuple[tuple, dict]]]:
    """The arguments of each call of a function inside the block."""
    original, made = getattr(owner, name), []

    def record(*args: Any, **kwargs: Any) -> Any:
        made.append((args, kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, record)
    try:
        yield made
    finally:
        setattr(owner, name, original)
