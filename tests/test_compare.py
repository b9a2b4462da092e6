"""`peft compare`: methods trained alike on labelled texts, in one table and one picture."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from peft.cli.check import UsageError, check_compare
from peft.cli.compare import run as compare
from peft.cli.compare.recipes import RECIPES
from peft.cli.compare.task import Task, read_task
from peft.cli.options import CompareOptions

transformers = pytest.importorskip("transformers")

WORDS = {"fruit": ["apple", "pear", "plum", "fig"], "metal": ["iron", "zinc", "gold", "tin"]}
FILLERS = ["the", "a", "old", "new", "we", "see"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *WORDS["fruit"], *WORDS["metal"]]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = []
    for i in range(120):
        kind = ("fruit", "metal")[i % 2]
        words = [*rng.choices(FILLERS, k=rng.randint(1, 4)), rng.choice(WORDS[kind])]
        rng.shuffle(words)
        rows.append(json.dumps({"text": " ".join(words), "label": kind}))
    path.write_text("\n".join(rows))
    return path


@pytest.fixture
def options(encoder: Path, texts: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> CompareOptions:
        given = {"model": str(encoder), "data": str(texts), "output": tmp_path / "out", "steps": 2, "batch": 8}
        return CompareOptions(**{**given, **changes})

    return make


def test_methods_are_trained_measured_and_written_down(options, capsys):
    chosen = options(methods="full,head,lora,ia3", steps=80, lr_scale=3.0)
    check_compare(chosen)
    assert compare.run(chosen) == 0
    kept = json.loads((chosen.output / "results.json").read_text())["results"]
    assert list(kept) == ["probe", "full", "head", "lora", "ia3"]
    assert kept["full"]["accuracy"] > 0.9 and kept["lora"]["accuracy"] > kept["head"]["accuracy"]
    assert kept["head"]["adapter"] == 0 < kept["ia3"]["adapter"] < kept["lora"]["adapter"] < kept["full"]["trained"]
    assert kept["head"]["kept"] < kept["lora"]["kept"]
    page = (chosen.output / "comparison.md").read_text()
    assert all(f"| {name} |" in page for name in kept)
    assert (chosen.output / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_finished_methods_are_not_run_again(options, monkeypatch):
    assert compare.run(options(methods="head")) == 0
    before, run = [], compare.measured
    monkeypatch.setattr(compare, "measured", lambda name, *rest: before.append(name) or run(name, *rest))
    assert compare.run(options(methods="head,lora")) == 0
    assert before == ["lora"]


def test_other_settings_in_the_same_folder_are_refused(options):
    assert compare.run(options(methods="head")) == 0
    with pytest.raises(UsageError, match="other settings \\(steps\\)"):
        compare.run(options(methods="head", steps=3))
    assert compare.run(options(methods="head", steps=3, overwrite=True)) == 0


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"methods": "lora,lorra"}, "--methods lorra.*lora"),
        ({"steps": 0}, "--steps 0"),
        ({"eval_split": 1.0}, "--eval-split 1.0"),
        ({"lr_scale": 0.0}, "--lr-scale"),
        ({"data": "missing.jsonl"}, "missing.jsonl: does not exist"),
    ],
)
def test_options_that_cannot_be_right_are_named(options, changes, words):
    with pytest.raises(UsageError, match=words):
        check_compare(options(**changes))


@pytest.mark.parametrize("column, words", [("label", "row 2: needs a text"), ("text", "row 2: needs a text")])
def test_a_row_without_text_or_class_is_named(tmp_path, column, words):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    del rows[1][column]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match=words):
        read_task(None, str(path), None, 0.2, (None, None), 8, 0)


def test_every_batch_has_its_size_and_every_text_comes_once_a_pass():
    task = Task(None, [("x" * (i % 7), i) for i in range(64)], [], ["a"], 8)
    found = task.batches(8, 8, seed=0)
    assert [len(rows) for rows in found] == [8] * 8
    assert sorted(label for rows in found for _, label in rows) == list(range(64))


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.config is not None])
def test_every_recipe_trains_its_adapter_and_the_head(options, name):
    chosen = options(methods=name, steps=2)
    task = read_task(compare.load_tokenizer(chosen.model), chosen.data, None, 0.2, (None, None), 16, 0)
    model, adapter = compare.prepared(name, chosen, task)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    compare.fit(model, task, task.batches(8, 2, 0), RECIPES[name].lr, compare._tasks(name))
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(before[n], p)]
    assert adapter > 0
    assert any("classifier" in n for n in moved) and any("classifier" not in n and "pooler" not in n for n in moved)
