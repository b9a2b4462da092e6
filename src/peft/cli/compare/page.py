"""The comparison as a page: a table, and accuracy against trained parameters as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.cli.compare.recipes import ADJUSTED
from peft.cli.options import CompareOptions
from peft.cli.report import has_matplotlib
from peft.cli.state import replace
from peft.core.commit import make_folders

if TYPE_CHECKING:
    from peft.cli.compare.run import Result
    from peft.cli.compare.task import Task

HEAD = (
    "method", "accuracy", "loss", "adapter parameters", "all trained", "step / full", "kept for backward", "file",
    "learning rate",
)  # fmt: skip
REFERENCES = ("probe", "head", "full")


def write_page(results: Sequence[Result], options: CompareOptions, task: Task, path: Path) -> None:
    """Write the table as Markdown, and the picture beside it."""
    make_folders(path.parent)
    error = 100 * math.sqrt(0.25 / len(task.test))
    rows = sorted(results, key=lambda r: -r.accuracy)
    picture = draw(results, path.with_suffix(".png"))
    base = named(Path(options.model)) if Path(options.model).exists() else options.model
    seen = [
        f"{r.method} (before: {', '.join(f'{lr:g}' for lr in ADJUSTED[r.method])})"
        for r in rows
        if r.method in ADJUSTED
    ]
    text = [
        "# Methods compared\n\n",
        f"`peft compare` on {len(task.train):,d} texts of {len(task.classes)} classes, {len(task.test):,d} held out; "
        f"base model `{base}`, {options.steps} steps of {options.batch}, AdamW, seed {options.seed}.\n"
        "Every method trains the classifier's head too. One seed, learning rates by experience and not by search: "
        f"with {len(task.test):,d} held-out texts the standard error is up to {error:.1f} points, so that neighbours "
        "in the table are ties.\n",
        f"Chosen after a look at the held-out accuracy of earlier rates: {', '.join(seen)}.\n\n" if seen else "\n",
        "- `probe`: logistic regression on the frozen model's mean hidden state. `head`: the head alone. `full`: all "
        "parameters.\n"
        "- step / full: time of a training step over that of full fine-tuning, median of steps in alternation.\n"
        "- kept for backward: activations that one step keeps, MiB, parameters left out. file: what is saved, KiB.\n\n",
        f"![Accuracy against trained parameters]({path.with_suffix('.png').name})\n\n" if picture else "",
        f"| {' | '.join(HEAD)} |\n|---|{'--:|' * (len(HEAD) - 1)}\n",
        *(f"| {' | '.join(cells(r))} |\n" for r in rows),
    ]
    replace(path, lambda temporary: temporary.write_text("".join(text), encoding="utf-8"))


def named(folder: Path) -> str:
    """What to call a model in a folder: the folder, and the one around it where its own name says nothing."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name in ("model", "checkpoint", "output") else folder.name


def cells(r: Result) -> list[str]:
    """One line of the table."""
    trained = r.method != "probe"
    return [
        r.method,
        f"{100 * r.accuracy:.1f} %",
        f"{r.loss:.3f}",
        f"{r.adapter:,d}" if r.method not in REFERENCES else "",
        f"{r.trained:,d}",
        f"{r.time:.2f}" if trained else "",
        f"{r.kept:.0f}" if trained else "",
        f"{r.file:,.0f}" if trained else "",
        f"{r.lr:g}" if trained else "",
    ]


def draw(results: Sequence[Result], path: Path) -> bool:
    """The picture; False without matplotlib."""
    if not has_matplotlib():
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for r in results:
        if r.method in REFERENCES:
            style = {"probe": ":", "head": "--", "full": "-"}[r.method]
            axes.axhline(100 * r.accuracy, color="0.5", linestyle=style, linewidth=1, label=f"{r.method}")
        else:
            axes.plot(r.adapter, 100 * r.accuracy, "o", color="C0", markersize=5)
            axes.annotate(r.method, (r.adapter, 100 * r.accuracy), (4, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set(xlabel="trained parameters of the adapter", ylabel="accuracy on held-out texts (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, format="png")
    return True
