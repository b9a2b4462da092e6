"""Cartridges and prefixes that start from the cache of a text, and cartridges joined into one.

In a prompt (k, 2 layers x heads x size), entry 2 i of a token is its keys in layer i, entry 2 i + 1 its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import PeftConfig
from ...core.checkpoint import load_peft_weights
from ...core.files import staged, write_weights
from ...core.past import past_of
from ...core.seen import evaluating
from ...errors import PeftWarning, check_adapters, report
from ...prompts.fitting import text_config
from ...types import PeftType, plain

SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache as a prompt, (k, 2 layers x heads x size).

    Arguments:
        past_key_values: the cache of one text: of transformers, or a pair of (keys, values) for each layer, each
            (1, heads, tokens, size).
        num_virtual_tokens: k.

    Raises TypeError for what is no cache; ValueError for an empty one, several texts, fewer than k tokens, or layers of
    different shapes.
    """
    pairs = list(_pairs(past_key_values))
    if not pairs:
        raise ValueError("past_key_values is empty. Run the model on the text first, with use_cache=True.")
    if num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens is {num_virtual_tokens}. Take at least one token.")
    shape = pairs[0][0].shape
    for i, pair in enumerate(pairs):
        for name, held in zip(("keys", "values"), pair, strict=True):
            if held.dim() != 4 or (held.shape[1], held.shape[3]) != (shape[1], shape[3]):
                raise ValueError(
                    f"The {name} of layer {i} are {tuple(held.shape)}, but the keys of layer 0 {tuple(shape)}: a "
                    "prompt needs (1, heads, tokens, size) with the same heads and size everywhere."
                )
            if held.shape[0] != 1:
                raise ValueError(f"past_key_values holds a batch of {held.shape[0]} texts. Run the model on one.")
            if held.shape[2] < num_virtual_tokens:
                raise ValueError(
                    f"num_virtual_tokens={num_virtual_tokens}, but layer {i} holds {held.shape[2]} tokens. Use a "
                    "longer text, or fewer virtual tokens."
                )
    entries = [held[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for pair in pairs for held in pair]
    return torch.cat(entries, dim=1)


def _pairs(cache: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(keys, values) of every layer, with the tokens that are there."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", cache)
    if not isinstance(layers, (list, tuple)):
        raise TypeError(f"past_key_values is a {type(cache).__name__}, which is no cache that can be read here.")
    for i, layer in enumerate(layers):
        if isinstance(layer, (list, tuple)):
            keys, values = layer[:2]
        elif hasattr(layer, "keys") and hasattr(layer, "values"):
            if layer.keys is None:
                raise ValueError(f"Layer {i} of past_key_values holds nothing. Run the model on the text first.")
            length = int(layer.get_seq_length())
            if length > layer.keys.shape[2]:
                raise ValueError(f"Layer {i} of past_key_values attends to a window and has dropped the first tokens.")
            keys, values = layer.keys[:, :, :length], layer.values[:, :, :length]
        else:
            raise TypeError(f"Layer {i} of past_key_values is a {type(layer).__name__}, not a pair of keys and values.")
        yield keys, values


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Let a cartridge or a prefix start from the cache of a text; returns the prompt, (k, 2 layers x heads x size).

    Arguments:
        model: a PeftModel.
        adapter_name: the adapter; None means the active one.
        past_key_values: see `prompt_embeddings_from_past_key_values`.
        num_virtual_tokens: k; None means the adapter's.

    Raises ValueError for other methods, a prefix with projection, or a cache that does not fit.
    """
    name, config = _key_value_adapter(model, adapter_name)
    count = config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    made = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    model.prompt_encoder[name].load_prompt_embeddings(made)
    return made


def _key_value_adapter(model: Any, adapter_name: str | None) -> tuple[str, Any]:
    name = model.active_adapter if adapter_name is None else adapter_name
    check_adapters([name], model.peft_config)
    config = model.peft_config[name]
    if config.peft_type not in (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING):
        raise ValueError(
            f"Adapter {name!r} is {plain(config.peft_type)}; only cartridges and prefix "
            "tuning (without projection) are keys and values that can start from a text."
        )
    if getattr(config, "prefix_projection", False):
        raise ValueError(
            f"Adapter {name!r} has prefix_projection: a network makes its keys and values, so they cannot be set."
        )
    return name, config


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a cartridge or a prefix start from a text; returns the prompt, (k, 2 layers x heads x size).

    Arguments:
        model: a PeftModel.
        tokenizer: of the base model.
        text: at least k tokens long.
        adapter_name: the adapter; None means the active one.
        num_virtual_tokens: k; None means the adapter's.
        use_chat_template: give the text as a system message; a tokenizer without a template splits it as it is.
        max_length: read no more tokens than this.

    Raises ValueError as `initialize_kv_prefix_from_past_key_values` does.
    """
    _, config = _key_value_adapter(model, adapter_name)
    ids = _ids(tokenizer, text, use_chat_template)[:, :max_length]
    base = model.get_base_model()
    own = text_config(base)
    if any(getattr(own, name, None) is not None for name in ("sliding_window", "attention_chunk_size")):
        ids = ids[:, : num_virtual_tokens or config.num_virtual_tokens]  # which see none of the later ones, or drop out
    ids = ids.to(base.get_input_embeddings().weight.device)
    with torch.no_grad(), model.disable_adapter(), evaluating(base):
        cache = past_of(base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True))
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def _ids(tokenizer: Any, text: str, use_chat_template: bool) -> Tensor:
    """The ids of the text, (1, tokens)."""
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        try:
            found = tokenizer.apply_chat_template(message, tokenize=True, return_dict=True, return_tensors="pt")
            return torch.as_tensor(found["input_ids"], device="cpu")
        except Exception as error:  # templates raise errors of their own, such as for a lone system message
            hint = f"The chat template refuses a lone system message ({error}); the text is taken as it is."
            report(PeftWarning, hint, strict=False, stacklevel=4)
    return torch.as_tensor(tokenizer(text, return_tensors="pt")["input_ids"], device="cpu")


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Join saved cartridges into one, whose tokens are theirs one after the other.

    Arguments:
        adapter_paths: two folders or more; of the first, the configuration is kept.
        output_path: the new folder.
        safe_serialization: safetensors; False writes a pickle.

    Raises ValueError if they are no cartridges, or of different models.
    """
    paths = [str(p) for p in adapter_paths]
    if len(paths) < 2:
        raise ValueError(f"adapter_paths names {len(paths)} adapters. Give two or more to join.")
    configs: list[Any] = [PeftConfig.from_pretrained(p) for p in paths]
    for path, config in zip(paths, configs, strict=True):
        if config.peft_type != PeftType.CARTRIDGE:
            raise ValueError(f"The adapter in {path!r} is {config.peft_type.value}, no CARTRIDGE.")
        other = [
            f"{n}={getattr(config, n)!r}, not {getattr(configs[0], n)!r}"
            for n in SAME
            if _differ(config, configs[0], n)
        ]
        if other:
            raise ValueError(f"The adapter in {path!r} has {'; '.join(other)}: it belongs to another model or task.")
    made = torch.cat([load_peft_weights(p)["prompt_embeddings"] for p in paths])
    config = configs[0]
    config.num_virtual_tokens = made.shape[0]
    with staged(output_path) as stage:
        write_weights({"prompt_embeddings": made}, stage, safe_serialization)
        config.save_pretrained(stage)


def _differ(one: Any, other: Any, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))
