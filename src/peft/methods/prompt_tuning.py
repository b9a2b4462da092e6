"""Prompt tuning: a few trained embeddings in front of the text.

    [P; E(text)],   P (k, size)

P starts from N(0, 1), from words drawn at random, or from the words of a text. An encoder-decoder has P in front of its
encoder's text. Source: Lester et al. 2021, arXiv 2104.08691, section 2.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig, describe
from ..prompts.encoder import BasePromptEncoder, embedding
from ..target_config import choice
from ..types import PeftType


class PromptTuningInit(str, enum.Enum):
    """What a prompt starts from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """The configuration of prompt tuning."""

    prompt_tuning_init: PromptTuningInit | str = field(
        default=PromptTuningInit.RANDOM,
        metadata=describe("What the prompt starts from: 'RANDOM', 'SAMPLE_VOCAB' (random words) or 'TEXT'."),
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata=describe("The text to start from."))
    tokenizer_name_or_path: str | None = field(
        default=None, metadata=describe("The tokenizer that splits the text to start from.")
    )
    tokenizer_kwargs: dict | None = field(
        default=None, metadata=describe("Arguments of AutoTokenizer.from_pretrained; trust_remote_code is left out.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        self.check_init(PromptTuningInit)

    def check_init(self, known: Any) -> None:
        """Raise ValueError for a start that cannot be."""
        choice("prompt_tuning_init", self.prompt_tuning_init, tuple(m.value for m in known))
        text = self.prompt_tuning_init == "TEXT"
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if text and not getattr(self, name):
                raise ValueError(
                    f"When prompt_tuning_init='TEXT', {name} can't be None: give the text and a tokenizer."
                )
        if self.tokenizer_kwargs and not text:
            raise ValueError("tokenizer_kwargs only has a use with prompt_tuning_init='TEXT'. Leave it out.")


class PromptEmbedding(BasePromptEncoder):
    """The virtual tokens of prompt tuning.

    Arguments:
        config: a `PromptTuningConfig`, filled in.
        word_embeddings: the model's embedding, from whose rows the prompt may start.
    """

    lasts = True

    def __init__(self, config: Any, word_embeddings: nn.Module) -> None:
        super().__init__(config)
        start = None if config.inference_mode else self.start(config, word_embeddings)
        self.embedding = embedding(self.rows, self.token_dim, start)

    @classmethod
    def make(cls, config: Any, words: nn.Module) -> PromptEmbedding:
        return cls(config, words)

    def start(self, config: Any, words: Any) -> Tensor | None:
        """The first values, (rows, size); None for random ones."""
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, words.weight.shape[0], (self.rows,), device="cpu")
        elif config.prompt_tuning_init == "TEXT":
            ids = self.words_of(config)
        else:
            return None
        with torch.no_grad():
            found: Tensor = words(ids.to(words.weight.device))
        return found

    def words_of(self, config: Any) -> Tensor:
        """The ids of the text to start from, repeated or cut to (rows,).

        Raises ValueError if the text has no tokens.
        """
        from transformers import AutoTokenizer

        options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
        ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
        if not ids:
            raise ValueError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens.")
        return torch.tensor((ids * -(-self.rows // len(ids)))[: self.rows], device="cpu")

    def forward(self, indices: Tensor) -> Tensor:
        """The embeddings of virtual tokens (tokens,) or (batch, tokens): a last axis of `size` more."""
        found: Tensor = self.embedding(indices)
        return found
