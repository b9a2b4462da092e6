"""Cartridges: the keys and values of a long text, made short and trained, in front of those of every attention layer.

    Attention(q, [F_K; T_K; K], [F_V; T_V; V]),   [F; T] (k, 2 layers x heads x size of a head)

F, the first few tokens, stays frozen: attention rests on them, and training them is unstable. [F; T] usually starts
from the cache of a text (`utils`). Source: Eyuboglu et al. 2025, arXiv 2506.06266, section 3. The order of the entries
is that of prefix tuning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...prompts.encoder import KIND
from ..prefix_tuning import KeyValueEncoder


class CartridgeEncoder(KeyValueEncoder):
    """The keys and values of a cartridge.

    Arguments:
        config: a `CartridgeConfig`, filled in.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        config.check_frozen()
        self.num_frozen_tokens = frozen = int(config.num_frozen_tokens)
        self.frozen_embedding = (
            nn.Parameter(torch.empty(frozen, self.width, **KIND), requires_grad=False) if frozen else None
        )
        self.trainable_embedding = nn.Parameter(
            torch.empty(self.rows - frozen, self.width, **KIND), requires_grad=not config.inference_mode
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all tokens from N(0, 1)."""
        for part in self._parts():
            part.normal_()

    def _parts(self) -> list[Tensor]:
        return [p for p in (self.frozen_embedding, self.trainable_embedding) if p is not None]

    @property
    def weight(self) -> Tensor:
        """Frozen and trained tokens, (k, 2 layers x heads x size of a head)."""
        return torch.cat(self._parts())

    @property
    def embedding(self) -> CartridgeEncoder:
        """The module that has `weight`."""
        return self

    def trained(self) -> list[nn.Parameter]:
        """The tokens that are not frozen."""
        return [self.trainable_embedding]

    def forward(self, prefix_tokens: Tensor) -> Tensor:
        """The keys and values of virtual tokens (tokens,) or (batch, tokens): a last axis of 2 layers x size more."""
        return self.weight[prefix_tokens]

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the tensors of a file."""
        self.load_prompt_embeddings(state["prompt_embeddings"])

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take keys and values (k, 2 layers x size), frozen ones first.

        Raises ValueError for another shape.
        """
        if prompt_embeddings.shape != (self.rows, self.width):
            raise ValueError(
                f"The cartridge is {(self.rows, self.width)}, but prompt_embeddings {tuple(prompt_embeddings.shape)}."
            )
        for part, new in zip(self._parts(), prompt_embeddings.split([len(p) for p in self._parts()]), strict=True):
            part.copy_(new)
