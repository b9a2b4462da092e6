"""What a measure is, and the clock and counters that measures share."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Numbers = dict[str, float]
LONG = 0.6  # seconds for the calls of one work in `turns`


@dataclass(frozen=True)
class Measure:
    """One subject: a generator whose every step is one repetition and yields its numbers.

    Attributes:
        name: as given to `--only`.
        title: what is done, with its sizes.
        steps: makes the generator; setting up happens before its first yield.
        repeats: how many repetitions the quick set takes.
        unit: of all its numbers: "s", "MiB", or "" for a plain count; "key|unit" in the numbers overrides it.
        limits: key -> largest accepted value of ours, as a share of the peer's.
        ceilings: key -> largest accepted value of ours, absolute.
        derive: further rows computed from the smallest values.
        noise: whether the third process takes part. Not where that would take minutes and neighbours tell as much.
    """

    name: str
    title: str
    steps: Callable[[], Iterator[Numbers]]
    repeats: int = 3
    unit: str = "s"
    limits: dict[str, float] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    derive: Callable[[Numbers], Numbers] | None = None
    noise: bool = True


MEASURES: dict[str, Measure] = {}


def measure(title: str, **options: Any) -> Callable[[Callable[[], Iterator[Numbers]]], Callable[[], Iterator[Numbers]]]:
    """Register a generator function under its own name."""

    def register(steps: Callable[[], Iterator[Numbers]]) -> Callable[[], Iterator[Numbers]]:
        name = steps.__name__
        MEASURES[name] = Measure(name, title, steps, **options)
        return steps

    return register


OVER = ": over bare|x"


def added(numbers: Numbers) -> Numbers:
    """What the adapters cost over the bare model, and the whole as a multiple of it where that was not measured."""
    bare = numbers["bare"]
    rows: Numbers = {}
    for key, value in numbers.items():
        if key != "bare" and "|" not in key:
            over = rows[f"{key}{OVER}"] = numbers.get(f"{key}{OVER}", value / bare)
            rows[f"{key}: added to bare"] = (over - 1) * bare
    return rows


def spent(work: Callable[[], object], times: int = 1) -> float:
    """Process time of one call of `work`, in seconds, as the mean of `times` calls in a row."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """The same, garbage collected before."""
    gc.collect()
    return spent(work, times)


def in_a_row(works: Iterable[Callable[[], object]]) -> list[float]:
    """`spent` of each of several calls, garbage collected before the first: a collection can take longer than they."""
    gc.collect()
    return [spent(work) for work in works]


def smallest(work: Callable[[], object], slices: int, times: int = 1) -> float:
    """The smallest of several slices of `spent`, garbage collected before the first."""
    gc.collect()
    return min(spent(work, times) for _ in range(slices))


def turns(bare: Callable[[], object], works: Mapping[str, Callable[[], object]], most: int) -> Numbers:
    """The smallest `spent` of each work, and how many times that of the bare model it is.

    A busy machine is now quick and now slow, for seconds on end. So the bare model runs before and after each call, and
    the multiple is of these neighbours: the median of up to `most` calls, two at least, fewer where `LONG` is spent.
    """
    gc.collect()
    before = least = spent(bare)
    numbers: Numbers = {}
    for name, work in works.items():
        times: list[float] = []
        over: list[float] = []
        while len(over) < 2 or (len(over) < most and sum(times) < LONG):
            times.append(spent(work))
            after = spent(bare)
            over.append(2 * times[-1] / (before + after))
            before, least = after, min(least, after)
        numbers |= {name: min(times), f"{name}{OVER}": statistics.median(over)}
    return {"bare": least} | numbers


def several(work: Callable[[], float], most: int, enough: float) -> list[float]:
    """What `work` says that it needed, up to `most` times; fewer where `enough` seconds are spent."""
    found = [work()]
    while len(found) < most and sum(found) < enough:
        found.append(work())
    return found


def calls(work: Callable[[], object]) -> int:
    """How many Python and C functions one call of `work` enters."""
    count = 0

    def watch(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    collects = gc.isenabled()
    gc.disable()  # finalizers of other objects are no part of it
    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()
    return count
