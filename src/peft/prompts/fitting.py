"""What a prompt configuration leaves to the model, and the parts of the model that prompts touch."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import PromptLearningConfig
from ..errors import PeftWarning, report
from ..types import PeftType
from . import keys

_NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text part; None if the model has no configuration."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        return config.get_text_config()  # type: ignore[union-attr]
    return getattr(config, "text_config", config)


def fit(model: nn.Module, config: PromptLearningConfig) -> None:
    """Fill in the sizes that the configuration leaves open.

    Raises ValueError for what the model's configuration does not say either, and for what no model has.
    """
    if not isinstance(config.num_virtual_tokens, int) or config.num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens is {config.num_virtual_tokens!r}. Give the number of tokens, at least 1.")
    base, cached = text_config(model), config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
    given = config.token_dim
    for name, sources in _NAMES.items():
        if getattr(config, name) is None:
            sources = (*keys.LAYERS, *sources) if cached and name == "num_layers" else sources
            found = next((getattr(base, s) for s in sources if getattr(base, s, None) is not None), None)
            if found is None:
                raise ValueError(
                    f"{name} is not set, and the configuration of {type(model).__name__} has none of "
                    f"{', '.join(sources)}. Set {name} in the {type(config).__name__}."
                )
            setattr(config, name, found)
    _fit_submodules(base, config)
    if cached:
        _fit_keys(base, config)
    else:
        _fit_words(word_embeddings(model), config, given)
    if getattr(config, "encoder_hidden_size", 0) is None:  # of the keys, where these are smaller
        config.encoder_hidden_size = config.token_dim  # type: ignore[attr-defined]


def _fit_words(words: Any, config: Any, given: int | None) -> None:
    """Virtual tokens are as wide as words, which some models project to their hidden size."""
    width = getattr(words, "embedding_dim", None)
    if width is None:
        return
    if given not in (None, width):
        text = (
            f"token_dim={given} cannot be: virtual tokens stand beside words, which are {width} wide. {width} is used."
        )
        report(PeftWarning, text, strict=False, stacklevel=6)
    config.token_dim = width


def _fit_submodules(base: Any, config: Any) -> None:
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    most = 2 if getattr(base, "is_encoder_decoder", True) else 1
    if config.num_transformer_submodules not in range(1, most + 1):
        raise ValueError(
            f"num_transformer_submodules={config.num_transformer_submodules!r}, but the model has "
            f"{'an encoder and a decoder' if most == 2 else 'one stack of layers'}. Use {most}, or leave it out."
        )


def _fit_keys(base: Any, config: Any) -> None:
    """Keys and values have the heads of the layers' own, which grouped attention has fewer of."""
    made = keys.provided(base)
    if made is not None:
        config.token_dim, config.num_attention_heads = made[0] * made[1], made[0]
    left = keys.left_out(base, config.num_layers, made)
    if len(left) == config.num_layers:
        raise ValueError("No layer of the model keeps keys and values of its own that a prefix could stand before.")
    if left:
        text = (
            f"The prefix stands in every layer but {left}: these keep no keys of their own, or larger ones than it has."
        )
        report(PeftWarning, text, strict=False, stacklevel=6)


def word_embeddings(model: nn.Module) -> nn.Module:
    """The model's embedding of words.

    Raises ValueError if the model does not tell, and no parameter has a row for each word.
    """
    known = getattr(model, "get_input_embeddings", None)
    if known is not None:
        try:
            found = known()
        except NotImplementedError:
            found = None
        if isinstance(found, nn.Module):
            return found
    size = getattr(text_config(model), "vocab_size", None)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and size is not None and weight.dim() == 2 and weight.shape[0] == size:
            return module
    raise ValueError(
        f"{type(model).__name__} has no embedding of words that prompts could stand beside: it has no "
        "get_input_embeddings(), and no weight with a row for each word of its configuration's vocab_size."
    )


def further_words(model: nn.Module) -> Any:
    """The module with further embeddings of the ids, one for each layer; None where there are none."""
    if not getattr(text_config(model), "hidden_size_per_layer_input", None):
        return None
    return next((m for m in model.modules() if hasattr(m, "get_per_layer_inputs")), None)
