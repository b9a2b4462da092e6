"""From repetitions to a table: smallest and median values, ratios, noise, and whether each goal is met."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import OVER, Measure, Numbers

HEADER = ("", "ours", "ours, median", "peer", "ours / peer", "noise", "goal")


@dataclass
class Result:
    """Every repetition of one measure, by side."""

    subject: Measure
    runs: dict[str, list[Numbers]]
    errors: dict[str, str] = field(default_factory=dict)

    def best(self, side: str) -> Numbers:
        """The smallest value of each number, with what the measure derives from them; of multiples the median."""
        return self._summary(side, min)

    def median(self, side: str) -> Numbers:
        """The median of each number, likewise."""
        return self._summary(side, statistics.median)

    def _summary(self, side: str, choose: Any) -> Numbers:
        runs = self.runs.get(side) or []
        if not runs:
            return {}
        keys = dict.fromkeys(key for run in runs for key in run)  # a repetition may be of some numbers only
        of_all = {key: [run[key] for run in runs if key in run] for key in keys}
        numbers = {k: (statistics.median if k.endswith(OVER) else choose)(found) for k, found in of_all.items()}
        return numbers | (self.subject.derive(numbers) if self.subject.derive else {})

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured, and the summary."""
        return {
            "name": self.subject.name,
            "title": self.subject.title,
            "runs": self.runs,
            "best": {side: self.best(side) for side in self.runs},
            "median": {side: self.median(side) for side in self.runs},
            "errors": self.errors,
        }


def shown(value: float | None, unit: str) -> str:
    """A number with its unit, three digits."""
    if value is None:
        return ""
    if unit == "s":
        return next(
            f"{value * k:.3g} {u}" for k, u in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if abs(value * k) >= 1 or u == "µs"
        )
    return f"{value:,.0f}" if not unit and value == int(value) else f"{value:.3g}{' ' * bool(unit)}{unit}"


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b where both are known and b is not zero."""
    return a / b if a is not None and b else None


def goal(subject: Measure, key: str, ours: float | None, over: float | None) -> str:
    """What was asked of ours, and whether it holds."""
    unit = unit_of(subject, key)
    parts = []
    if key in subject.ceilings:
        most = subject.ceilings[key]
        parts.append(f"<= {shown(most, unit)}: {verdict(ours, most)}")
    if key in subject.limits:
        most = subject.limits[key]
        parts.append(f"<= {most:g} x: {verdict(over, most)}")
    return "; ".join(parts)


def verdict(value: float | None, most: float) -> str:
    """met, missed, or a dash where nothing was measured."""
    return "-" if value is None else "met" if value <= most else "missed"


def unit_of(subject: Measure, key: str) -> str:
    """The unit after the bar in the key, or the measure's own."""
    return key.split("|")[1] if "|" in key else subject.unit


def rows(result: Result) -> list[tuple[str, ...]]:
    """One row per number."""
    ours, median = result.best("ours"), result.median("ours")
    peer, again = result.best("peer"), result.best("ours again")
    table = []
    for key in dict.fromkeys([*ours, *peer]):
        unit = unit_of(result.subject, key)
        over, noise = ratio(ours.get(key), peer.get(key)), ratio(again.get(key), ours.get(key))
        table.append(
            (
                key.split("|")[0],
                shown(ours.get(key), unit),
                shown(median.get(key), unit),
                shown(peer.get(key), unit),
                "" if over is None else f"{over:.3g}",
                "" if noise is None else f"{noise:.2f}",
                goal(result.subject, key, ours.get(key), over),
            )
        )
    return table


def text(result: Result) -> str:
    """The measure as an aligned table for a terminal."""
    table = [HEADER, *rows(result)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
    lines = [f"{result.subject.title}  [{result.subject.name}]"]
    lines += [
        "  " + "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]
    lines += [f"  {side} failed: {error}" for side, error in result.errors.items()]
    return "\n".join(lines)


def markdown(results: list[Result]) -> str:
    """All measures as one document."""
    parts = []
    for result in results:
        table = [f"| {' | '.join(row)} |" for row in rows(result)]
        head = [f"| {' | '.join(HEADER)} |", "|---|" + "--:|" * (len(HEADER) - 2) + "---|"]
        notes = [f"\n{side} failed: {error}" for side, error in result.errors.items()]
        parts.append("\n".join([f"### {result.subject.title}\n", *head, *table, *notes]))
    return "\n\n".join(parts) + "\n"
