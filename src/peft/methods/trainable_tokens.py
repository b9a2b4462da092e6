"""Trainable tokens: new values for some rows of an embedding, and nothing else.

    W' = W with the rows of the chosen tokens replaced by delta (n, d), which starts as those rows

The output layer that is tied to the embedding shares delta. On a linear layer that is chosen itself, the tokens are
out-features. The mathematics is that of `trainable_token_indices` of other methods (`core/tokens.py`). Different from
the peer: a linear layer keeps its bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ..config import describe
from ..core.targets import walk
from ..core.tie import input_embedding
from ..core.tokens import TokenRows, TrainableTokensLayer
from ..core.tuner import BaseTuner
from ..core.views import LABELS
from ..target_config import TargetConfig, rank

__all__ = ["TrainableTokensConfig", "TrainableTokensLayer", "TrainableTokensModel"]


@dataclass
class TrainableTokensConfig(TargetConfig):
    """The configuration of trainable tokens; target_modules is the model's input embedding if it is not set."""

    kind = "TRAINABLE_TOKENS"
    added = frozenset({"layers_to_transform", "layers_pattern", "bias", "exclude_modules", "modules_to_save"})
    ranks = ()
    ensure_weight_tying: ClassVar[bool] = True
    embedding_leads: ClassVar[bool] = True  # what is tied to it and chosen without it has rows of its own, as in files
    token_indices: list[int] = field(default_factory=list, metadata=describe("The tokens to train."))
    init_weights: bool = field(default=True, metadata=describe("Start at the base model; else random."))

    def check(self) -> None:
        """Whole numbers."""
        for i in self.token_indices:
            rank("token_indices", i + 1 if isinstance(i, int) and not isinstance(i, bool) and i >= 0 else i)


class TrainableTokensModel(BaseTuner):
    """Trained rows of embeddings of a model."""

    prefix = "trainable_tokens_"
    layer_classes = dict.fromkeys(LABELS, TrainableTokensLayer)

    @classmethod
    def method_of(cls, settings: Any) -> TokenRows:
        """The rows that the configuration names."""
        return TokenRows(settings.token_indices, at_base=settings.init_weights, argument="token_indices")

    @classmethod
    def plan_of(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any = None) -> Any:
        """The plan, of the input embedding if nothing is named."""
        if config.target_modules is None:
            found = input_embedding(model, walk(model))
            config.target_modules = {"embed_tokens" if found is None else found[0]}
        return super().plan_of(model, config, adapter_name, state_dict)
