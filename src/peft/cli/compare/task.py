"""The task: labelled texts as batches, and what a model makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from peft.cli.check import UsageError
from peft.cli.data import read_rows
from peft.errors import nearest

LABELS = ("label", "labels", "class", "category")
Text = tuple[str, int]


@dataclass
class Task:
    """Labelled texts for training and for measuring."""

    tokenizer: Any
    train: list[Text]
    test: list[Text]
    classes: list[str]
    max_length: int

    def encode(self, rows: Sequence[Text]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the model (batch, tokens), padded to the longest text, and classes (batch,)."""
        texts = [text for text, _ in rows]
        found = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )  # fmt: skip
        return dict(found), torch.tensor([label for _, label in rows])

    def batches(self, size: int, steps: int, seed: int) -> list[list[Text]]:
        """One batch a step, in an order fixed by the seed; texts of similar length stand together."""
        generator = torch.Generator().manual_seed(seed)
        found: list[list[int]] = []
        window = 8 * size
        while len(found) < steps:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            parts = [sorted(order[i : i + window], key=self._length) for i in range(0, len(order), window)]
            pieces = [part[i : i + size] for part in parts for i in range(0, len(part), size)]
            found += [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
        return [[self.train[i] for i in piece] for piece in found[:steps]]

    def _length(self, index: int) -> int:
        return len(self.train[index][0])

    @torch.no_grad()
    def measure(self, model: nn.Module, extra: Any = None) -> tuple[float, float]:
        """(share of right answers, mean loss in nats) on the held-out texts; `extra(batch)` gives further inputs."""
        model.eval()
        right, loss = 0, 0.0
        rows = sorted(self.test, key=lambda row: len(row[0]))
        for start in range(0, len(rows), 64):
            inputs, labels = self.encode(rows[start : start + 64])
            logits = model(**inputs, **(extra(len(labels)) if extra else {})).logits.float()
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(cross_entropy(logits, labels, reduction="sum"))
        return right / len(rows), loss / len(rows)


def read_task(
    tokenizer: Any, data: str, eval_data: str | None, split: float, columns: Any, max_length: int, seed: int
) -> Task:
    """Read labelled texts; without `eval_data` a share of them, `split`, is held out.

    Arguments:
        columns: (text column, label column); None is found by its name.

    Raises UsageError for missing columns, unusable rows, or classes that training never sees.
    """
    train = _rows(data, "train", *columns)
    test = _rows(eval_data, "test", *columns) if eval_data else []
    if not eval_data:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, round(split * len(train)))
        train, test = [train[i] for i in order[count:]], [train[i] for i in order[:count]]
    classes = sorted({label for _, label in train})
    if len(classes) < 2:
        raise UsageError(f"--data {data}: holds {len(classes)} class. Give texts of at least two classes.")
    unseen = sorted({label for _, label in test} - set(classes))
    if unseen:
        raise UsageError(f"The held-out texts have the class {unseen[0]!r}, which no text for training has.")
    number = {label: i for i, label in enumerate(classes)}
    learn, held = ([(text, number[label]) for text, label in rows] for rows in (train, test))
    return Task(tokenizer, learn, held, classes, max_length)


def _rows(source: str, split: str, text: str | None, label: str | None) -> list[tuple[str, str]]:
    rows = read_rows(source, split)
    first = next(rows, None)
    if first is None:
        raise UsageError(f"{source}: no rows found.")
    names = list(first)
    text = _column("--text-column", text, ("text", "sentence"), names, source)
    label = _column("--label-column", label, LABELS, names, source)
    found = []
    for number, row in enumerate(itertools.chain([first], rows), 1):
        if not isinstance(row.get(text), str) or row.get(label) is None:
            raise UsageError(f"{source}, row {number}: needs a text in {text!r} and a class in {label!r}.")
        found.append((row[text], str(row[label])))
    return found


def _column(flag: str, name: str | None, usual: Sequence[str], names: list[str], source: str) -> str:
    found = name if name is not None else next((n for n in usual if n in names), None)
    if found not in names:
        hint = nearest(str(found), names) if found else ""
        raise UsageError(f"{flag}: {source} has the columns {', '.join(names)}.{hint} Name the column to read.")
    return str(found)


def probe(model: nn.Module, task: Task, decay: float = 1 / 30) -> tuple[float, float, int]:
    """Logistic regression on the frozen model's mean hidden state: (share right, loss, its number of parameters).

    Arguments:
        decay: weight of half the squared norm of the weights, against the sum of the losses.
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), model)
    x, y = _features(backbone, task, task.train)
    weight = torch.zeros(len(task.classes), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(task.classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, y, reduction="sum") + decay * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    x, y = _features(backbone, task, task.test)
    logits = (x @ weight.T + bias).detach()
    right = float((logits.argmax(-1) == y).float().mean())
    return right, float(cross_entropy(logits, y)), weight.numel() + bias.numel()


@torch.no_grad()
def _features(backbone: nn.Module, task: Task, rows: list[Text]) -> tuple[Tensor, Tensor]:
    backbone.eval()
    rows, found = sorted(rows, key=lambda row: len(row[0])), []
    for start in range(0, len(rows), 64):
        inputs, _ = task.encode(rows[start : start + 64])
        hidden, mask = backbone(**inputs).last_hidden_state.float(), inputs["attention_mask"][..., None]
        found.append(normalize((hidden * mask).sum(1) / mask.sum(1)))
    return torch.cat(found), torch.tensor([label for _, label in rows])
