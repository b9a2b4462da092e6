"""Loss, perplexity and token accuracy on the answers; `peft eval`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.cli.batch import IGNORED, Batch, Encoder, Layout, by_length
from peft.cli.data import Example, load_examples
from peft.cli.options import EvalOptions
from peft.cli.report import progress, table
from peft.core.base_state import model_below


@dataclass(frozen=True)
class Metrics:
    """Averages over answer tokens: loss in nats, accuracy of the likeliest token."""

    loss: float
    accuracy: float
    tokens: int
    examples: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_dict(self) -> dict[str, float]:
        """For the log."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "token_accuracy": self.accuracy,
            "tokens": self.tokens,
            "examples": self.examples,
        }

    def cells(self) -> list[str]:
        """For a table: loss, perplexity, token accuracy."""
        return [f"{self.loss:.3f}", f"{self.perplexity:.2f}", f"{100 * self.accuracy:.1f} %"]


def sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss, labelled tokens and right tokens as a (3,) float64 tensor.

    Arguments:
        logits: (B, K, vocabulary) float32.
        labels: (B, K), -100 where nothing is asked.
    """
    known = labels != IGNORED
    loss = F.cross_entropy(logits[known], labels[known], reduction="sum")
    right = (logits.argmax(-1) == labels)[known].sum()
    return torch.stack([loss.double(), known.sum().double(), right.double()])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    encoder: Encoder,
    layout: Layout,
    accelerator: Any,
    batch: int,
    advance: Callable[[int], None] = lambda n: None,
) -> Metrics:
    """Measure `model` on the answers of `examples`, shared among all processes; leaves its mode as it was.

    Arguments:
        model: a causal language model.
        examples: held-out examples.
        encoder: tokens of an example.
        layout: padding for this model.
        accelerator: `accelerate.Accelerator`.
        batch: examples at a time on each device.
        advance: called with the number of examples done.
    """
    training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    world = accelerator.num_processes
    for rows in by_length(examples, batch * world):
        mine = rows[accelerator.process_index :: world]
        # every process runs every batch, because wrapped models meet in their forward
        b: Batch = layout.batch([encoder(e) for e in mine or rows[:1]], accelerator.device)
        found = sums(b.logits(model), b.labels)
        if mine:
            total += found.cpu()
        advance(len(rows))
    model.train(training)
    loss, tokens, right = accelerator.reduce(total.to(accelerator.device)).tolist()
    return Metrics(loss / max(tokens, 1), right / max(tokens, 1), int(tokens), len(examples))


def run(options: EvalOptions) -> int:
    """`peft eval`: measure a saved adapter and print the result."""
    examples = load_examples(options, options.data, split="test", limit=options.limit)
    from peft.cli.model import end_together, load_adapter, make_accelerator
    from peft.cli.state import kept_template

    accelerator = make_accelerator()
    model, tokenizer = load_adapter(options.adapter, options.model, options.dtype, options.base_only, options.quantize)
    template = options.template or kept_template(options.adapter)
    encoder, layout = Encoder(tokenizer, template, options.max_length), Layout.of(model_below(model), tokenizer)
    with progress(disable=not accelerator.is_main_process) as bar:
        task = bar.add_task("evaluate", total=len(examples), loss="")
        if next(model.parameters()).device.type != accelerator.device.type:  # what is quantised is there
            model.to(accelerator.device)
        found = evaluate(model, examples, encoder, layout, accelerator, options.batch, lambda n: bar.advance(task, n))
    if accelerator.is_main_process:
        name = "base model" if options.base_only else str(options.adapter)
        head = ["", "loss", "perplexity", "token accuracy", "answer tokens", "examples"]
        table(options.data, head, [[name, *found.cells(), f"{found.tokens:,}", f"{found.examples:,}"]])
    end_together(accelerator)
    return 0
