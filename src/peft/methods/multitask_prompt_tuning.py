"""Multitask prompt tuning: one prompt for all tasks, and a product of low rank for each.

    [P * (U_t V_t); E(text)],   P (k, size), U_t (k, ranks), V_t (ranks, size),   t the task of the sample

Source: Wang et al. 2023, arXiv 2303.02861, section 3.2.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import describe
from ..kernels.modes import numbered
from ..prompts.encoder import KIND
from ..target_config import rank
from ..types import PeftType, plain
from .prompt_tuning import PromptEmbedding, PromptTuningConfig


class MultitaskPromptTuningInit(str, enum.Enum):
    """What the prompt starts from: a text, at random, or the prompts of source tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """The configuration of multitask prompt tuning."""

    prompt_tuning_init: MultitaskPromptTuningInit | str = field(
        default=MultitaskPromptTuningInit.RANDOM,
        metadata=describe(
            "What the prompt starts from: 'RANDOM', 'TEXT', the mean of the source tasks ('AVERAGE_SOURCE_TASKS'), one "
            "of them ('EXACT_SOURCE_TASK'), or what they share ('ONLY_SOURCE_SHARED')."
        ),
    )
    prompt_tuning_init_state_dict_path: str | None = field(
        default=None, metadata=describe("The file with the source tasks' prompts.")
    )
    prompt_tuning_init_task: int | None = field(default=0, metadata=describe("The number of the one source task."))
    num_ranks: int | None = field(default=1, metadata=describe("Rank of a task's own product."))
    num_tasks: int | None = field(default=1, metadata=describe("How many tasks there are."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING
        rank("num_ranks", self.num_ranks)
        rank("num_tasks", self.num_tasks)

    def check_init(self, known: Any) -> None:
        """Raise ValueError for a start that cannot be."""
        super().check_init(MultitaskPromptTuningInit)


class MultitaskPromptEmbedding(PromptEmbedding):
    """The virtual tokens of multitask prompt tuning.

    Arguments: as for `PromptEmbedding`.
    """

    by_task = True
    in_decoder = True
    lasts = True

    def __init__(self, config: Any, word_embeddings: nn.Module) -> None:
        super().__init__(config, word_embeddings)
        tasks, ranks = config.num_tasks, config.num_ranks
        self.num_tasks = tasks
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, self.rows, ranks, **KIND).normal_(0, 0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, ranks, self.token_dim, **KIND).normal_(0, 0.02))
        if config.prompt_tuning_init in SOURCES and not config.inference_mode:
            self.take_sources(config)

    @classmethod
    def asked(cls, config: Any) -> dict[str, int]:
        each, rows, width = config.num_tasks * config.num_ranks, config.num_virtual_tokens, config.token_dim or 1
        return {**super().asked(config), "prefix_task_cols": each * rows, "prefix_task_rows": each * width}

    @torch.no_grad()
    def take_sources(self, config: Any) -> None:
        """Start from the prompts of source tasks.

        Raises ValueError if no file is named, or if the file's tensors do not fit.
        """
        path = config.prompt_tuning_init_state_dict_path
        if path is None:
            raise ValueError(
                f"prompt_tuning_init_state_dict_path needs to be specified with prompt_tuning_init="
                f"{plain(config.prompt_tuning_init)!r}."
            )
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            of_task = {k: state[k].mean(0, keepdim=True) for k in ("prefix_task_cols", "prefix_task_rows")}
        elif config.prompt_tuning_init == "EXACT_SOURCE_TASK":
            of_task = {
                k: state[k][config.prompt_tuning_init_task][None] for k in ("prefix_task_cols", "prefix_task_rows")
            }
        else:
            of_task = {}
        own = {**{k: v for k, v in self.for_file().items() if k not in of_task}, **of_task}
        own["prompt_embeddings"] = state["prompt_embeddings"]
        for key, held in self.homes().items():
            if held.shape != own[key].shape:
                raise ValueError(
                    f"{key} of {str(path)!r} is {tuple(own[key].shape)}, but the prompt needs {tuple(held.shape)}: "
                    "num_tasks must be 1 for one source task or their mean, and tokens and ranks as many as there."
                )
        for key, held in self.homes().items():
            held.copy_(own[key])

    def homes(self) -> dict[str, nn.Parameter]:
        """{key in files: parameter}."""
        names = ("prefix_task_cols", "prefix_task_rows")
        return {"prompt_embeddings": self.embedding.weight, **{n: getattr(self, n) for n in names}}

    @torch.no_grad()
    def for_file(self) -> dict[str, Tensor]:
        """The tensors of a file: what the tasks share, and each task's factors."""
        return {k: p.detach().clone() for k, p in self.homes().items()}

    def facts(self, task_ids: Tensor | None) -> tuple[Any, ...]:
        """The tasks of the samples."""
        return () if task_ids is None else (self.num_tasks, *task_ids.tolist())

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """The embeddings of virtual tokens (batch, tokens) for the tasks (batch,): (batch, tokens, size).

        Raises ValueError for a task that does not exist.
        """
        if task_ids is None:
            raise ValueError("task_ids cannot be None: each sample has the prompt of its task.")
        known = not torch.compiler.is_compiling() and numbered(task_ids)
        if known and not bool(((task_ids >= 0) & (task_ids < self.num_tasks)).all()):
            raise ValueError(f"task_ids must lie in 0 to {self.num_tasks - 1} (num_tasks={self.num_tasks}).")
        own = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        made: Tensor = self.embedding(indices) * own
        return made
