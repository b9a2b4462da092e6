"""Examples from files and hub data sets: rows, the columns that matter, and prompt/answer pairs.

No torch here: columns are checked before any model is loaded.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.cli.check import UsageError, as_fraction, is_file_name, require
from peft.cli.options import DataOptions, TrainOptions
from peft.errors import nearest

PROMPTS = ("prompt", "question", "instruction")
ANSWERS = ("completion", "answer", "response", "output")
TEXTS = ("text",)
MESSAGES = ("messages", "conversations")

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn; or a conversation, whose last message is the answer."""

    prompt: str
    answer: str
    messages: tuple[dict[str, str], ...] = ()

    @property
    def length(self) -> int:
        """Size in characters, to put examples of similar length into one batch."""
        return len(self.prompt) + len(self.answer) + sum(len(m["content"]) for m in self.messages)


@dataclass(frozen=True)
class Columns:
    """The columns to read: `text` alone, `messages` alone, or `prompt` and `answer`."""

    prompt: str | None = None
    answer: str | None = None
    text: str | None = None
    messages: str | None = None

    def example(self, row: Row, where: str) -> Example:
        """The example in `row`; raises UsageError that names the place `where` if a value is unusable."""
        if self.messages:
            return Example("", "", _messages(row.get(self.messages), f"{where}, column {self.messages!r}"))
        if self.text:
            return Example("", _text(row, self.text, where))
        assert self.prompt and self.answer, "find_columns returns one complete kind"
        return Example(_text(row, self.prompt, where), _text(row, self.answer, where))


def load_examples(options: DataOptions, source: str, split: str = "train", limit: int | None = None) -> list[Example]:
    """All examples of a file or hub data set.

    Arguments:
        options: for the column names.
        source: file, or ORG/NAME[:split].
        split: of a hub data set, unless `source` names one.
        limit: read no more than this many.

    Raises UsageError for unreadable files, unknown columns and unusable rows.
    """
    rows = itertools.islice(read_rows(source, split), limit)
    first = next(rows, None)
    if first is None:
        raise UsageError(f"{source}: no rows found. Give a file with at least one example.")
    columns = find_columns(list(first), options, source)
    numbered = enumerate(itertools.chain([first], rows), 1)
    return [columns.example(row, f"{source}, row {number}") for number, row in numbered]


def load_train_and_eval(options: TrainOptions) -> tuple[list[Example], list[Example]]:
    """The training examples and the held-out ones (empty without --eval-data or --eval-split)."""
    train = load_examples(options, options.data)
    fraction = as_fraction(options.eval_split)
    if options.eval_data:
        return train, load_examples(options, options.eval_data, split="test")
    if fraction is not None:
        return _hold_out(train, fraction, options.seed)
    if options.eval_split:
        return train, load_examples(options, options.data.partition(":")[0], split=options.eval_split)
    return train, []


def _hold_out(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    shuffled = random.Random(seed).sample(examples, len(examples))
    count = max(1, round(len(examples) * fraction))
    if count >= len(examples):
        raise UsageError(f"--eval-split {fraction}: leaves none of {len(examples)} examples to train on.")
    return shuffled[count:], shuffled[:count]


def find_columns(names: list[str], options: DataOptions, source: str) -> Columns:
    """Which of the columns `names` to read: those the options name, else those with a usual name.

    Raises UsageError with the columns that exist if one is missing or nothing fits.
    """
    for flag, name in (("--prompt-column", options.prompt_column), ("--answer-column", options.answer_column),
                       ("--text-column", options.text_column)):  # fmt: skip
        if name is not None and name not in names:
            raise UsageError(f"{flag} {name}: {source} has the columns {', '.join(names)}.{nearest(name, names)}")
    if options.text_column:
        return Columns(text=options.text_column)
    prompt = options.prompt_column or _first(PROMPTS, names)
    answer = options.answer_column or _first(ANSWERS, names)
    if prompt and answer:
        return Columns(prompt=prompt, answer=answer)
    messages, text = _first(MESSAGES, names), _first(TEXTS, names)
    if options.prompt_column or options.answer_column or not (messages or text):
        raise UsageError(
            f"{source}: the columns {', '.join(names)} hold no known pair of prompt and answer. Name them "
            "with --prompt-column and --answer-column, or give whole texts with --text-column."
        )
    return Columns(messages=messages) if messages else Columns(text=text)


def _first(wanted: tuple[str, ...], names: list[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}, column {column!r}: found {value!r}, expected text. Mend or remove this row.")
    return value


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    fits = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not fits or not value or value[-1]["role"] != "assistant":
        raise UsageError(f"{where}: expected a list of {{role, content}} that ends with the assistant's answer.")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def read_rows(source: str, split: str = "train") -> Iterator[Row]:
    """Rows of a .jsonl, .csv or .parquet file, or of a hub data set (`source` may end in ":split")."""
    if not is_file_name(source):
        return _hub(source, split)
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    return _readable(Path(source), readers[Path(source).suffix])


def _readable(path: Path, read: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a file, with the errors of a damaged or unreadable one as a UsageError."""
    try:
        yield from read(path)
    except UsageError:
        raise
    except UnicodeDecodeError as problem:
        raise UsageError(f"{path}: is not UTF-8 (byte {problem.start}). Save it as UTF-8 text.") from None
    except (OSError, ValueError, csv.Error) as problem:  # pyarrow's errors are ValueErrors
        reason = str(problem).splitlines()[0]
        raise UsageError(
            f"{path}: cannot be read as {path.suffix[1:]} ({reason}). Check or make the file again."
        ) from None


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as problem:
                raise UsageError(f"{path}, line {number}: not JSON ({problem.msg}). Mend this line.") from None
            if not isinstance(row, dict):
                raise UsageError(f"{path}, line {number}: expected an object like {{...}}, found {line[:40]!r}.")
            yield row


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _parquet(path: Path) -> Iterator[Row]:
    require("pyarrow")
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for part in file.iter_batches():
            yield from part.to_pylist()


def _hub(source: str, split: str) -> Iterator[Row]:
    require("datasets")
    import datasets

    name, _, named_split = source.partition(":")
    try:
        yield from datasets.load_dataset(name, split=named_split or split)
    except (OSError, ValueError) as problem:
        raise UsageError(f"{source}: cannot be loaded from the hub ({str(problem).splitlines()[0]}).") from problem
