"""Prefix tuning: trained keys and values in front of those of every attention layer.

    Attention(q, [P_K; K], [P_V; V]),   P (k, 2 layers x heads x size of a head)

With `prefix_projection` a small network makes P from (k, size): Linear, tanh, Linear. Files hold P. With an encoder and
a decoder the prefix is the decoder's. Source: Li and Liang 2021, arXiv 2101.00190, section 4. The order of the entries
in P, and which of them a prefix for two stacks of layers reads, are those of the peer's files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig, describe
from ..prompts.encoder import KIND, BasePromptEncoder, embedding
from ..target_config import choice
from ..types import PeftType


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """The configuration of prefix tuning."""

    init_weights: Literal["zero"] | None = field(
        default=None, metadata=describe("'zero' starts from prefixes of zeros; None from random ones.")
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata=describe("Hidden size of the network that projects the prefix.")
    )
    prefix_projection: bool = field(
        default=False, metadata=describe("Train a small network that makes the prefix, instead of the prefix.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        choice("init_weights", self.init_weights, (None, "zero"))


class KeyValueEncoder(BasePromptEncoder):
    """A prompt that is keys and values of every layer."""

    caches = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rows = self.num_virtual_tokens
        self.layers, self.heads = int(config.num_layers), int(config.num_attention_heads)
        self.stride = 2 * int(config.num_transformer_submodules or 1)
        self.width = 2 * self.layers * self.token_dim
        if self.token_dim % self.heads:
            raise ValueError(
                f"token_dim={self.token_dim} is no multiple of num_attention_heads={self.heads}, its heads."
            )


class PrefixEncoder(KeyValueEncoder):
    """The prefix of prefix tuning, and the network that may make it.

    Arguments:
        config: a `PrefixTuningConfig`, filled in; with `inference_mode` there is no network.
    """

    network = ("transform",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.prefix_projection = config.prefix_projection and not config.inference_mode
        self.embedding = embedding(self.rows, self.token_dim if self.prefix_projection else self.width)
        last = self.embedding.weight
        if self.prefix_projection:
            hidden = config.encoder_hidden_size or self.token_dim
            first, second = nn.Linear(self.token_dim, hidden, **KIND), nn.Linear(hidden, self.width, **KIND)
            self.transform = nn.Sequential(first, nn.Tanh(), second)
            nn.init.zeros_(self.transform[2].bias) if config.init_weights == "zero" else None  # type: ignore[arg-type]
            last = self.transform[2].weight
        if config.init_weights == "zero":
            nn.init.zeros_(last)

    def forward(self, prefix: Tensor) -> Tensor:
        """The keys and values of virtual tokens (tokens,) or (batch, tokens): a last axis of 2 layers x size more."""
        h: Tensor = self.embedding(prefix)
        return h if self.flat else self.transform(h)

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take keys and values (tokens, 2 layers x size) as the prefix.

        Raises ValueError with a projection, or for another shape.
        """
        if not self.flat:
            raise ValueError("With prefix_projection a network makes the prefix, so it cannot be set. Train it.")
        if prompt_embeddings.shape != self.embedding.weight.shape:
            raise ValueError(
                f"The prefix is {tuple(self.embedding.weight.shape)}, but prompt_embeddings "
                f"{tuple(prompt_embeddings.shape)}."
            )
        self.embedding.weight.copy_(prompt_embeddings)
