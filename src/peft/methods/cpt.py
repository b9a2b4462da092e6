"""CPT: the words of a context stand in front of the text, and each may be moved a little.

    [E(context) + D; E(text)],   |D_i| <= eps_i

D starts at zero; eps is `opt_projection_epsilon` for the words of inputs and `opt_projection_format_epsilon` for those
of the template, times sqrt(size / 2048), and D is cut back to it on every forward. Words of labels stay as they are.
The loss counts the context's labels too, the older the less. Source: Tsachor et al. 2024, arXiv 2410.17222, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ..config import PromptLearningConfig, describe
from ..errors import PeftWarning, report
from ..prompts.encoder import KIND, BasePromptEncoder, embedding
from ..target_config import choice
from ..types import PeftType, TaskType

FIXED = 1e-10  # the room of words that are not moved


@dataclass
class CPTConfig(PromptLearningConfig):
    """The configuration of CPT."""

    cpt_token_ids: list[int] | None = field(default=None, metadata=describe("The words of the context."))
    cpt_mask: list[int] | None = field(default=None, metadata=describe("1 for words that are there, 0 for padding."))
    cpt_tokens_type_mask: list[int] | None = field(
        default=None,
        metadata=describe("The kind of each word: 4 e + 1 input template, + 2 input, + 3 output template, + 4 label."),
    )
    opt_weighted_loss_type: Literal["none", "decay"] | None = field(
        default="none", metadata=describe("'decay' counts the labels of older examples less.")
    )
    opt_loss_decay_factor: float | None = field(default=1.0, metadata=describe("The factor from example to example."))
    opt_projection_epsilon: float | None = field(default=0.1, metadata=describe("How far words of inputs may move."))
    opt_projection_format_epsilon: float | None = field(
        default=0.1, metadata=describe("How far words of the template may move.")
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata=describe("Kept for the files; not read."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CPT
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"CPT is for task_type='CAUSAL_LM' only; got {self.task_type!r}.")
        choice("opt_weighted_loss_type", self.opt_weighted_loss_type, ("none", "decay", None))
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        k = self.num_virtual_tokens = len(self.cpt_token_ids)
        self.cpt_mask = [1] * k if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = [1] * k if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        if len(self.cpt_mask) != k or len(self.cpt_tokens_type_mask) != k:
            raise ValueError(
                f"cpt_token_ids has {k} words, cpt_mask {len(self.cpt_mask)} and cpt_tokens_type_mask "
                f"{len(self.cpt_tokens_type_mask)} entries; they must be as many."
            )
        self.num_transformer_submodules = 1


class CPTEmbedding(BasePromptEncoder):
    """The context of CPT.

    Arguments:
        config: a `CPTConfig`, filled in.
        word_embeddings: the model's embedding.
    """

    own_loss = True
    lasts = True
    led = ("delta_embedding.weight",)

    def __init__(self, config: Any, word_embeddings: Any) -> None:
        super().__init__(config)
        self.config, self.words = config, config.cpt_token_ids
        ids = torch.tensor(config.cpt_token_ids, device=word_embeddings.weight.device)
        with torch.no_grad():
            self.embedding = embedding(self.rows, self.token_dim, word_embeddings(ids))
        self.delta_embedding = embedding(self.rows, self.token_dim, torch.zeros(self.rows, self.token_dim, **KIND))

    @classmethod
    def make(cls, config: Any, words: nn.Module) -> CPTEmbedding:
        return cls(config, words)

    def _kinds(self) -> Tensor:
        return torch.tensor(self.config.cpt_tokens_type_mask, device=self.embedding.weight.device)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take the words as files hold them, moves included; new moves start from there."""
        self.embedding.weight.copy_(state["prompt_embeddings"])
        self.delta_embedding.weight.zero_()

    def trained(self) -> list[nn.Parameter]:
        """The moves."""
        return list(self.delta_embedding.parameters())

    def facts(self, task_ids: Tensor | None) -> tuple[Any, ...]:
        """The kinds of the words, and how far they may move."""
        c = self.config
        return (*c.cpt_tokens_type_mask, c.opt_projection_epsilon, c.opt_projection_format_epsilon)

    def get_epsilon(self) -> Tensor:
        """How far each word may move, (k,)."""
        kinds, c, room = self._kinds(), self.config, math.sqrt(self.token_dim / 2048)
        eps = torch.full(kinds.shape, FIXED, dtype=torch.float32, device=kinds.device)
        eps[(kinds > 0) & ((kinds % 4 == 1) | (kinds % 4 == 3))] = c.opt_projection_format_epsilon * room
        eps[(kinds > 0) & (kinds % 4 == 2)] = c.opt_projection_epsilon * room
        return eps

    def forward(self, indices: Tensor) -> Tensor:
        """The embeddings of the context's words (tokens,): (tokens, size); moves are cut back first."""
        with torch.no_grad():
            moves = self.delta_embedding.weight
            norms, eps = moves.norm(dim=1), self.get_epsilon().to(moves.dtype)
            over = norms > eps * (1 + 1e-6)  # what was cut to eps is not cut again by rounding
            factor = torch.where(over, eps / norms, torch.ones_like(norms))
            moves.copy_(moves * factor[:, None])
        moving = (self._kinds() % 4 > 0).to(self.embedding.weight.dtype)  # words of labels stay as they are
        made: Tensor = self.embedding(indices) + self.delta_embedding(indices) * moving[indices][..., None]
        return made

    def loss(self, logits: Tensor, labels: Tensor, given: dict[str, Any], others: tuple[int, int] = (0, 0)) -> Tensor:
        """The loss of the labels in the context and in the text.

        Arguments:
            logits: (batch, k + n, words).
            labels: (batch, n).
            given: may hold `input_type_mask` (batch, n), the kind of each word of the text; all are labels without it.
            others: how many tokens of other prompts stand in front of the context, and behind it.
        """
        kinds, c = pad(self._kinds(), others), self.config
        of_text = given.get("input_type_mask")
        of_text = torch.full_like(labels, 4) if of_text is None else of_text.to(labels.device)
        of_text = torch.where(of_text > 0, of_text + kinds.max().to(of_text.device), of_text)
        mask = torch.cat([kinds.to(labels.device).expand(len(labels), -1), of_text], 1)
        words = pad(torch.tensor(c.cpt_token_ids, device=labels.device), others).expand(len(labels), -1)
        kept = (mask > 0) & (mask % 4 == 0)
        target = torch.where(kept, torch.cat([words, labels], 1), -100)[:, 1:]
        each = cross_entropy(logits[:, :-1].transpose(1, 2).float(), target, reduction="none", ignore_index=-100)
        kept = target != -100
        if not torch.compiler.is_compiling() and not kept.any():
            text = (
                "CPT: no word of the batch counts as a label (a type that is a multiple of 4), so the loss is 0. Check "
                "cpt_tokens_type_mask and input_type_mask."
            )
            report(PeftWarning, text, strict=False, stacklevel=5)
        weight = kept.to(each.dtype)
        if c.opt_weighted_loss_type == "decay":
            for row, kinds_of_row, chosen in zip(weight, mask[:, 1:], kept, strict=True):
                for age, kind in enumerate(sorted(kinds_of_row[chosen].unique().tolist(), reverse=True)):
                    row[chosen & (kinds_of_row == kind)] = c.opt_loss_decay_factor**age
        return (each * weight).sum() / kept.sum().clamp_min(1)
