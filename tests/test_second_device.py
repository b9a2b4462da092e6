"""Models on another device than the CPU, without a GPU: torch takes one of the tests' own for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import second_device


@pytest.mark.skipif(not second_device.compiler(), reason="needs a C++ compiler")
def test_on_a_device_all_is_what_it_is_on_the_cpu_and_nothing_waits(tmp_path):
    library = second_device.built(tmp_path)
    command = [sys.executable, "-m", "tests.second_device.work", str(library)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    checked = int(run.stdout.split()[-4])
    assert checked > 1500
