"""What can be counted exactly stays within its budget: the untimed goals of `benchmarks`."""

from __future__ import annotations

import pytest

import benchmarks.subjects  # noqa: F401  (registers the measures)
from benchmarks.measure import MEASURES


@pytest.mark.parametrize("name", ["saved", "forward_calls", "compiled", "merge"])
def test_counts_stay_within_their_ceilings(name: str) -> None:
    subject = MEASURES[name]
    numbers = next(subject.steps())
    assert not {key: numbers[key] for key, most in subject.ceilings.items() if numbers[key] > most}
