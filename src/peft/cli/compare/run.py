"""Train each method on the same batches and note what it reached and what it cost."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from peft.cli import report
from peft.cli.check import UsageError
from peft.cli.compare.page import write_page
from peft.cli.compare.recipes import RECIPES, config_of
from peft.cli.compare.task import Task, probe, read_task
from peft.cli.model import load, load_tokenizer, torch_dtype
from peft.cli.options import CompareOptions
from peft.cli.state import replace
from peft.core.commit import make_folders

HEADS = ("classifier", "score", "pooler", "pre_classifier")
TIMED = 6  # steps in alternation with full fine-tuning


@dataclass
class Result:
    """What one method reached and cost."""

    method: str
    accuracy: float
    loss: float
    adapter: int = 0  # trained parameters without the head
    trained: int = 0
    lr: float = 0.0
    time: float = 0.0  # of a step, over full fine-tuning's
    kept: float = 0.0  # MiB kept for the backward pass
    file: float = 0.0  # KiB saved
    seconds: float = 0.0  # of the training


def run(options: CompareOptions) -> int:
    """Compare; finished methods are kept in OUTPUT/results.json and not run again."""
    names = chosen(options.methods)
    tokenizer = load_tokenizer(options.model)
    columns = (options.text_column, options.label_column)
    task = read_task(
        tokenizer, options.data, options.eval_data, options.eval_split, columns, options.max_length, options.seed
    )
    setting = {**asdict(options), "methods": "", "output": "", "report": "", "overwrite": False}
    store = options.output / "results.json"
    results = _earlier(store, setting, options.overwrite)
    report.say(f"{len(task.train)} texts to learn from, {len(task.test)} held out, {len(task.classes)} classes.")
    for name in ["probe", *names]:
        if name not in results:
            results[name] = measured(name, options, task)
            make_folders(options.output)
            kept = {"setting": setting, "results": {n: asdict(r) for n, r in results.items()}}
            _write(store, json.dumps(kept, indent=1, default=str))
        report.say(line(results[name]))
    shown = [results[n] for n in ["probe", *names]]
    page = options.report or options.output / "comparison.md"
    write_page(shown, options, task, page)
    report.say(f"Table: {page}. Picture: {page.with_suffix('.png')}.")
    return 0


def _write(path: Path, text: str) -> None:
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def chosen(methods: str) -> list[str]:
    """The recipes that `--methods` names; "all" names all of them."""
    names = list(RECIPES) if methods == "all" else [m.strip() for m in methods.split(",") if m.strip() != "probe"]
    return names


def _earlier(store: Path, setting: dict[str, Any], overwrite: bool) -> dict[str, Result]:
    if overwrite or not store.is_file():
        return {}
    kept = json.loads(store.read_text(encoding="utf-8"))
    if kept["setting"] != json.loads(json.dumps(setting, default=str)):
        other = [k for k, v in kept["setting"].items() if json.loads(json.dumps(setting, default=str)).get(k) != v]
        raise UsageError(
            f"--output {store.parent}: holds a comparison with other settings ({', '.join(other)}). Give another "
            "folder, or --overwrite."
        )
    return {name: Result(**values) for name, values in kept["results"].items()}


def line(r: Result) -> str:
    """A result in one line."""
    return (
        f"{r.method:16} {100 * r.accuracy:5.1f} % right, loss {r.loss:.3f}, {r.trained:>10,d} trained, "
        f"step {r.time:.2f} x full, {r.seconds:.0f} s"
    )


def measured(name: str, options: CompareOptions, task: Task) -> Result:
    """Train and measure one method on a fresh model."""
    start = time.perf_counter()
    if name == "probe":
        accuracy, loss, count = probe(classifier(options, task), task)
        return Result(name, accuracy, loss, 0, count, seconds=time.perf_counter() - start)
    model, adapter = prepared(name, options, task)
    batches = task.batches(options.batch, options.steps, options.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    lr = RECIPES[name].lr * options.lr_scale
    fit(model, task, batches, lr, _tasks(name))
    seconds = time.perf_counter() - start
    accuracy, loss = task.measure(model, _tasks(name))
    result = Result(name, accuracy, loss, adapter, sum(p.numel() for p in trained), lr, seconds=seconds)
    result.file = _saved(model)
    result.kept = kept_for_backward(model, task, batches[0], _tasks(name))
    result.time = 1.0 if name == "full" else against_full(model, options, task, batches, _tasks(name))
    del model, trained
    gc.collect()
    return result


def classifier(options: CompareOptions, task: Task) -> nn.Module:
    """The model with a fresh classifier, the same for every method."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    kind, dtype = AutoModelForSequenceClassification, torch_dtype(options.dtype)
    return load(
        "--model",
        options.model,
        lambda: kind.from_pretrained(options.model, num_labels=len(task.classes), dtype=dtype),
    )


def prepared(name: str, options: CompareOptions, task: Task) -> tuple[Any, int]:
    """The model of a recipe, and how many parameters it trains beside the head."""
    from peft import get_peft_model

    model = classifier(options, task)
    head = [n for n in HEADS if any(path.rpartition(".")[2] == n for path, _ in model.named_modules())]
    config = config_of(name, options.steps, head, model)
    if config is None:
        for path, p in model.named_parameters():
            p.requires_grad_(RECIPES[name].whole or any(part in head for part in path.split(".")))
    else:
        torch.manual_seed(options.seed)
        model = get_peft_model(model, config)
    of_head = sum(
        p.numel() for path, p in model.named_parameters() if p.requires_grad and set(path.split(".")) & set(head)
    )
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad) - of_head


def _tasks(name: str) -> Callable[[int], dict[str, torch.Tensor]] | None:
    if not RECIPES[name].tasks:
        return None
    return lambda count: {"task_ids": torch.zeros(count, dtype=torch.long)}


def step(model: Any, task: Task, rows: Sequence[Any], extra: Any) -> torch.Tensor:
    """The loss of one batch; what a method adds to the loss is in it."""
    inputs, labels = task.encode(rows)
    more = extra(len(labels)) if extra else {}
    out = model(**inputs, labels=labels, **more)
    loss: torch.Tensor = out.loss if out.loss is not None else cross_entropy(out.logits.float(), labels)
    return loss


def fit(model: Any, task: Task, batches: list[Any], lr: float, extra: Any = None) -> None:
    """AdamW, a rise over a tenth of the steps and a straight fall, gradients cut at norm 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    rise, steps = max(1, len(batches) // 10), len(batches)
    slope = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / rise, max(0.0, (steps - s) / (steps - rise + 1)))
    )
    model.train()
    for rows in batches:
        step(model, task, rows, extra).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        slope.step()
        optimizer.zero_grad()


def _saved(model: Any) -> float:
    """KiB of the saved adapter (of the whole model where it is trained itself)."""
    if not hasattr(model, "peft_config"):
        return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 1024
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors")) / 1024


def kept_for_backward(model: Any, task: Task, rows: Any, extra: Any = None) -> float:
    """MiB of the tensors that one training step keeps for its backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step(model, task, rows, extra)
    total = sum(found.values())
    del loss
    return total / 2**20


def against_full(model: Any, options: CompareOptions, task: Task, batches: list[Any], extra: Any) -> float:
    """The time of a training step over that of full fine-tuning: the median of steps in alternation."""
    other, _ = prepared("full", options, task)
    pair = []
    for each, more in ((model, extra), (other, None)):
        trained = [p for p in each.parameters() if p.requires_grad]
        pair.append((each.train(), torch.optim.AdamW(trained, lr=0.0), more))
    ratios = []
    for rows in batches[: TIMED + 1]:
        times = []
        for each, optimizer, more in pair:
            start = time.perf_counter()
            step(each, task, rows, more).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])
