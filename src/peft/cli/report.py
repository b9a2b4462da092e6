"""What the user sees: messages, tables, progress bars and the loss curve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Where tables and messages go: standard output."""
    from rich.console import Console

    return Console(highlight=False)


def error(message: str) -> None:
    """Print a message to standard error, unwrapped, so that it can be searched and copied."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {_plain(message)}", soft_wrap=True)


def say(message: str) -> None:
    """Print one line to standard output."""
    console().print(_plain(message), soft_wrap=True)


def as_json(values: Mapping[str, Any]) -> None:
    """Print JSON to standard output, by itself."""
    print(json.dumps(values, indent=2, default=lambda v: sorted(v) if isinstance(v, set | frozenset) else str(v)))


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
    """Print a table; the first `text_columns` columns are text, the others numbers.

    Arguments:
        title: above the table.
        head: column names.
        rows: cells as text, one list for each row.
        text_columns: how many columns are flushed left.
    """
    from rich import box
    from rich.table import Table

    lines = text_columns > 1  # cells of running text fold: lines keep the rows apart
    t = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", show_lines=lines)
    for i, name in enumerate(head):
        t.add_column(name, justify="left" if i < text_columns else "right", overflow="fold")
    for row in rows:
        t.add_row(*(_plain(cell) for cell in row))
    console().print(t)


def progress(disable: bool = False) -> Any:
    """A `rich.progress.Progress` with bar, count, loss and time left; fields: `loss` (text)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeft(),
        console=console(),
        disable=disable,
    )


def loss_curve(path: Path, losses: Sequence[float], title: str, held_out: dict[int, float] | None = None) -> bool:
    """Draw the loss of each step, its running mean and the held-out loss as a PNG.

    Arguments:
        path: of the picture.
        losses: one value for each step (nats per answer token).
        title: above the picture.
        held_out: step -> loss on held-out examples.

    Returns False if matplotlib is not installed.
    """
    if not has_matplotlib():
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.7", linewidth=1, label="each step")
    window = max(2, len(losses) // 6)
    axes.plot(steps, running_mean(losses, window), color="C0", linewidth=2, label=f"mean of {window} steps")
    if held_out:
        axes.plot(list(held_out), list(held_out.values()), "o", color="C3", label="held-out examples")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="step", ylabel="answer loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")
    return True


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window - 1` values before it."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(p) / len(p) for p in parts]


def peak_memory() -> float:
    """The largest resident size of this process so far, in GiB (0 where the system does not tell)."""
    try:
        import resource
        import sys
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@cache
def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
