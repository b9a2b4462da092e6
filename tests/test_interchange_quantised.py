"""LoRA on bitsandbytes' weights beside the peer's, live: files made by either, outputs, gradients and merges of both.

PEFT_PEER names an interpreter with the other library (`make parity` builds one); without it only our half runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes")

from parity import quantised

ROOT = Path(__file__).resolve().parent.parent
CASES = {case: (kind, form) for case, kind, form in quantised.cases()}
each = pytest.mark.parametrize("case", CASES)
MERGED = {"nf4": 0.12, "fp4": 0.2, "int8": 0.01}  # what rounding W' leaves of it, relative


def apart(found, wanted):
    """The relative distance of two tensors."""
    return float((found - wanted).norm() / wanted.norm())


def update(folder, form, number):
    """s B A of a layer, from the file."""
    state, told = (
        load_file(str(folder / "adapter_model.safetensors")),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    s = told["lora_alpha"] / (told["r"] ** 0.5 if form == "rslora" else told["r"])
    name = f"base_model.model.{('up', 'down')[number]}.lora_"
    return s * state[f"{name}B.weight"] @ state[f"{name}A.weight"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Our adapters, and our answers to them: (folder, {case: {name: tensor}})."""
    folder = tmp_path_factory.mktemp("ours")
    return folder, {case: answered(folder, case) for case in CASES}


def answered(folder, case):
    found, errors = quantised.answers(partial(quantised.adapted, folder / case, *CASES[case]))
    assert not errors
    return found


@pytest.fixture(scope="module")
def both(own, tmp_path_factory):
    """[(ours, the peer's)] for adapters that we made, and for those that the peer made."""
    peer = os.environ.get("PEFT_PEER")
    if not peer:
        pytest.skip("PEFT_PEER names no interpreter with the peer")
    folder, ours = own
    made = tmp_path_factory.mktemp("theirs")
    to, there = (_peer(peer, place, made / f"{name}.safetensors") for place, name in ((folder, "to"), (made, "from")))
    return [(folder, ours, to), (made, {case: answered(made, case) for case in CASES}, there)]


def _peer(peer, place, file):
    command = [peer, "-E", "-m", "parity.quantised", str(place), str(file)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    with safe_open(str(file), framework="pt") as f:
        told = f.metadata()
    assert str(ROOT) not in told["library"] and json.loads(told["errors"]) == {}
    found = {case: {} for case in CASES}
    for name, tensor in load_file(str(file)).items():
        case, _, part = name.partition(": ")
        found[case][part] = tensor
    return found


@each
def test_our_half(case, own):
    folder, found = own[0], own[1][case]
    kind, form = CASES[case]
    for i in (0, 1):
        base, merged = found[f"base weight {i}"], found[f"merged weight {i}"]
        assert torch.equal(found[f"unmerged weight {i}"], base) and not torch.equal(merged, base)
        if form != "dora":
            assert apart(merged, base + update(folder / case, form, i)) < MERGED[kind]
    assert apart(found["unmerged"], found["training"]) < 0.02  # kernels for evaluation round a little more
    assert apart(found["evaluation"], found["training"]) < 0.02
    assert 0 < apart(found["merged"], found["training"]) < 3 * MERGED[kind]
    assert apart(found["disabled"], found["training"]) > 0.02


@each
def test_both_compute_the_same(case, both):
    kind, form = CASES[case]
    for _, ours, theirs in both:
        mine, other = ours[case], theirs[case]
        assert mine.keys() == other.keys()
        for name, found in mine.items():
            if re.match("unmerged|merged", name) or (name == "evaluation" and form == "dora" and kind != "int8"):
                continue  # below
            limit = 1e-6 if form == "dora" else 0
            assert apart(found, other[name]) <= limit, name


@each
def test_both_merge_the_same(case, both):
    kind, form = CASES[case]
    for folder, ours, theirs in both:
        mine, other = ours[case], theirs[case]
        for name in ("merged weight 0", "merged weight 1", "merged"):
            # the peer rounds eight bits by way of a product in half precision, we as bitsandbytes' own function does
            assert apart(mine[name], other[name]) <= (5e-3 if kind == "int8" else 1e-6 if form == "dora" else 0), name
        for i in (0, 1) if form != "dora" else ():
            wanted = mine[f"base weight {i}"] + update(folder / case, form, i)
            assert apart(mine[f"merged weight {i}"], wanted) <= 1.001 * apart(other[f"merged weight {i}"], wanted)


@each
def test_unmerging_gives_back_the_payload_which_the_peer_s_rounds_again(case, both):
    for _, ours, theirs in both:
        for i in (0, 1):
            base = ours[case][f"base weight {i}"]
            assert torch.equal(ours[case][f"unmerged weight {i}"], base)
            assert apart(theirs[case][f"unmerged weight {i}"], base) > 1e-3


@pytest.mark.parametrize("case", ["nf4-dora", "fp4-dora"])
def test_dora_s_norms_in_evaluation_are_those_of_training(case, both):
    """Where a CPU has a kernel of its own, bitsandbytes reorders the weight at the first call; the peer reads it so."""
    for _, ours, theirs in both:
        mine, other = (side[case] for side in (ours, theirs))
        assert apart(mine["evaluation"], mine["training"]) < 0.01
        assert apart(mine["evaluation"], mine["training"]) <= 1.001 * apart(other["evaluation"], other["training"])
