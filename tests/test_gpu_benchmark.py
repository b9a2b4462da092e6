"""`benchmarks.gpu` does its work, here on a small model on the CPU, and measures nothing where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu

SMALL = gpu.Sizes(layers=1, hidden=32, inner=48, heads=2, vocabulary=64, batch=2, tokens=4, adapters=3, rank=4)


@pytest.mark.parametrize("subject", gpu.SUBJECTS)
def test_every_repetition_has_the_bare_model_and_the_adapted_one(subject):
    steps = gpu.SUBJECTS[subject](SMALL, "cpu")
    found = [next(steps), next(steps)]
    assert found[0].keys() == found[1].keys() > {"bare"}
    assert all(value > 0 for numbers in found for value in numbers.values())
    least = min(numbers["bare"] for numbers in found)
    assert f"{least * 1e3:.3f} ms" in gpu.table(subject, {"ours": found})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_and_that_is_said(capsys):
    assert gpu.main([]) == 1
    assert capsys.readouterr().out.strip() == gpu.NO_GPU
