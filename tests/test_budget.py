"""What can be counted exactly stays within its budget: the untimed goals of `benchmarks`."""

from __future__ import annotations

import pytest

import benchmarks.subjects  # noqa: F401  (registers the measures)
from benchmarks.measure import MEASURES, Numbers


def once(name: str) -> Numbers:
    """One repetition of a measure."""
    return next(MEASURES[name].steps())


COUNTED = [
    "saved",
    "saved_beyond",
    "gradients",
    "compiled",
    "merge",
    "forward_calls",
    "layer_operations",
]


@pytest.mark.parametrize("name", COUNTED)
def test_counts_stay_within_their_ceilings(name: str) -> None:
    numbers = once(name)
    assert not {key: numbers[key] for key, most in MEASURES[name].ceilings.items() if numbers[key] > most}
