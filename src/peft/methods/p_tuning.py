"""P-tuning: embeddings in front of the text that a small network makes, which training alone needs.

    [h(P); E(text)],   h = MLP(P), or MLP(LSTM(P)) with an LSTM in both directions,   P (k, size)

Files hold h(P). Source: Liu et al. 2021, arXiv 2103.10385, section 3.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..config import PromptLearningConfig, describe
from ..errors import PeftWarning, report
from ..prompts.encoder import KIND, BasePromptEncoder, embedding
from ..target_config import choice
from ..types import PeftType


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that makes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """The configuration of P-tuning."""

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = field(
        default=PromptEncoderReparameterizationType.MLP, metadata=describe("The network: 'MLP' or 'LSTM'.")
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata=describe("Hidden size of the network; the size of an embedding if not set.")
    )
    encoder_num_layers: int = field(default=2, metadata=describe("Layers of the LSTM; the MLP has three."))
    encoder_dropout: float = field(default=0.0, metadata=describe("Dropout between the layers of the LSTM."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        kinds = tuple(m.value for m in PromptEncoderReparameterizationType)
        choice("encoder_reparameterization_type", self.encoder_reparameterization_type, kinds)
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != 2:
            text = f"encoder_num_layers={self.encoder_num_layers} has no effect: the MLP has a fixed number of layers."
            report(PeftWarning, text, strict=False, stacklevel=4)


class PromptEncoder(BasePromptEncoder):
    """The virtual tokens of P-tuning, and the network that makes them.

    Arguments:
        config: a `PromptEncoderConfig`, filled in; with `inference_mode` there is no network.
    """

    network = ("lstm_head", "mlp_head")
    lasts = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = embedding(self.rows, self.token_dim)
        if config.inference_mode:
            return
        size, hidden = self.token_dim, config.encoder_hidden_size or self.token_dim
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(
                size, hidden, config.encoder_num_layers, dropout=config.encoder_dropout, bidirectional=True,
                batch_first=True, **KIND,
            )  # fmt: skip
            sizes: tuple[int, ...] = (2 * hidden, 2 * hidden, size)
        else:
            sizes = (size, hidden, hidden, size)
        layers = [m for pair in pairwise(sizes) for m in (nn.Linear(*pair, **KIND), nn.ReLU())]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def forward(self, indices: Tensor) -> Tensor:
        """The embeddings of virtual tokens (tokens,) or (batch, tokens): a last axis of `size` more."""
        h: Tensor = self.embedding(indices)
        if "lstm_head" in self._modules:
            h = self.lstm_head(h)[0]
        return self.mlp_head(h) if "mlp_head" in self._modules else h
