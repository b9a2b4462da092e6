"""From examples to tensors: order of the examples, tokens, labels, padding.

Labels are made from the answers' lengths, never by comparing with the padding token: many models pad with the
end token, and would otherwise never learn to stop. Answers sit at the end of each row (left padding), so that
the model can leave out the logits of the prompts: a large share of the work where the vocabulary is large.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft.cli.check import UsageError
from peft.cli.data import Example

IGNORED = -100  # the label that torch's cross entropy leaves out
WINDOW = 8  # batches sorted by length together


@dataclass(frozen=True)
class Encoder:
    """Turns an example into tokens.

    Arguments:
        tokenizer: of the base model.
        template: text with {prompt} in it, "chat" for the tokenizer's own, None for the bare prompt.
        max_length: in tokens; prompts are cut at the beginning, then answers at the end.
    """

    tokenizer: Any
    template: str | None
    max_length: int

    def prompt(self, text: str) -> list[int]:
        """Tokens of a prompt inside the template, with the model's first token if it has one."""
        if self.template == "chat":
            return self._tokens(self._chat([{"role": "user", "content": text}], open_answer=True))
        return self._tokens(text if self.template is None else self.template.replace("{prompt}", text))

    def __call__(self, example: Example) -> tuple[list[int], list[int]]:
        """Tokens of prompt and answer; the answer ends with the end token, neither is empty."""
        if example.messages:
            prompt, answer = self._conversation(list(example.messages))
        else:
            prompt = self.prompt(example.prompt) if example.prompt else self._start()
            answer = self._tokens(example.answer, first=False) + self._end()
        if not prompt:
            prompt, answer = answer[:1], answer[1:]  # the first token of a bare text has nothing before it
        answer = answer[: self.max_length - 1]
        return prompt[-(self.max_length - len(answer)) :], answer

    def _conversation(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        before, whole = self._chat(messages[:-1], open_answer=True), self._chat(messages, open_answer=False)
        answer = whole[len(before) :].rstrip() if whole.startswith(before) else messages[-1]["content"]
        end = self.tokenizer.eos_token or ""
        return self._tokens(before), self._tokens(answer.removesuffix(end), first=False) + self._end()

    def _chat(self, messages: list[dict[str, str]], open_answer: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("The tokenizer has no chat template. Give --template with {prompt}, and plain columns.")
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)

    def _tokens(self, text: str, first: bool = True) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        start = self._start() if first else []
        return ids if ids[: len(start)] == start else start + ids

    def _start(self) -> list[int]:
        added = self.tokenizer("")["input_ids"]
        return added[:1] if added and added[0] == self.tokenizer.bos_token_id else []

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]


@dataclass(frozen=True)
class Layout:
    """How a model wants its batches.

    Arguments:
        left: pad on the left and ask for the answers' logits only.
        positions: pass position_ids.
        cache: the model has `use_cache`, which training switches off.
        pad: token to fill up with (masked everywhere).
    """

    left: bool
    positions: bool
    cache: bool
    pad: int

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any) -> Layout:
        """The layout for a base model, read from the arguments of its forward."""
        names = inspect.signature(model.forward).parameters
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        positions = "position_ids" in names
        return cls("logits_to_keep" in names and positions, positions, "use_cache" in names, pad or 0)

    def batch(self, encoded: Sequence[tuple[list[int], list[int]]], device: Any) -> Batch:
        """One batch (B examples, T tokens, K labelled positions) on `device`."""
        T = max(len(p) + len(a) for p, a in encoded)
        K = max(len(a) for _, a in encoded) if self.left else T - 1
        ids = torch.full((len(encoded), T), self.pad)
        mask = torch.zeros(len(encoded), T, dtype=torch.long)
        labels = torch.full((len(encoded), K), IGNORED)
        for i, (prompt, answer) in enumerate(encoded):
            n = len(prompt) + len(answer)
            end = T if self.left else n
            ids[i, end - n : end] = torch.tensor(prompt + answer)
            mask[i, end - n : end] = 1
            last = end - T + K
            labels[i, last - len(answer) : last] = torch.tensor(answer)
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self.positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(device)
        if self.left:
            inputs["logits_to_keep"] = K + 1
        if self.cache:
            inputs["use_cache"] = False
        return Batch(inputs, labels.to(device))


@dataclass(frozen=True)
class Batch:
    """Arguments of the model and labels (B, K) for its last K + 1 logits, shifted by one."""

    inputs: dict[str, Any]
    labels: Tensor

    def logits(self, model: nn.Module) -> Tensor:
        """Float32 logits that predict the labels, (B, K, vocabulary)."""
        K = self.labels.shape[1]
        return model(**self.inputs).logits[:, -(K + 1) : -1].float()


def order(lengths: Sequence[int], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of example numbers: shuffled passes over the data, similar lengths together.

    Arguments:
        lengths: one for each example.
        batch: examples in each batch (all devices and accumulated batches together).
        seed: fixes the order, so that a resumed run sees what an unbroken one would have seen.
    """
    rng = random.Random(seed)
    count = min(WINDOW, max(1, len(lengths) // batch))  # a window longer than the data would repeat examples
    stream = itertools.chain.from_iterable(rng.sample(range(len(lengths)), len(lengths)) for _ in itertools.count())
    while True:
        window = sorted(itertools.islice(stream, batch * count), key=lengths.__getitem__)
        batches = [window[i : i + batch] for i in range(0, len(window), batch)]
        yield from rng.sample(batches, len(batches))


def by_length(examples: Sequence[Example], batch: int) -> Iterable[list[Example]]:
    """All examples in batches of similar length, the longest first (an out-of-memory shows at once)."""
    ranked = sorted(examples, key=lambda e: -e.length)
    return [ranked[i : i + batch] for i in range(0, len(ranked), batch)]
