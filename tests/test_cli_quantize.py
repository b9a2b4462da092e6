"""`peft train --quantize` and what follows: measuring, answering, merging; each message where it cannot be done."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from peft.cli.check import QUANTIZED
from peft.cli.quantize import KINDS
from test_cli import examples, invoke, model, train_with  # noqa: F401

HIDDEN = 32


def test_the_names_are_told_once() -> None:
    assert list(KINDS) == list(QUANTIZED)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_and_used_on_quantised_weights(
    kind: str,
    model: Path,  # noqa: F811
    examples: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip(QUANTIZED[kind])
    out = tmp_path / "out"
    more = ("--quantize", kind, "--eval-split", 0.2, "--steps", 6, "--lr", 0.05)
    done = train_with(model, examples, out, *more)
    assert done.exit_code == 0, done.output
    assert f"{kind} in float32" in done.output
    log = json.loads((out / "training_log.json").read_text())
    assert log["after"]["loss"] < log["before"]["loss"]
    assert log["all_parameters"] == sum(p.numel() for p in whole(model).parameters()) + log["trainable_parameters"]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)

    measured = invoke("eval", "--adapter", out, "--data", examples, "--dtype", "fp32")
    dense = invoke("eval", "--adapter", out, "--data", examples, "--dtype", "fp32", "--quantize", "none")
    again = invoke("eval", "--adapter", out, "--data", examples, "--dtype", "fp32", "--quantize", kind)
    assert measured.exit_code == dense.exit_code == 0, measured.output
    assert measured.output == again.output
    assert invoke("generate", "--adapter", out, "--prompt", "say 1: ", "--max-new-tokens", 2).exit_code == 0

    merged = invoke("merge", "--base", model, "--adapter", out, "--out", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    assert f"trained on {kind} weights" in merged.output
    assert_merged(model, out, tmp_path / "merged")


def whole(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_merged(model: Path, adapter: Path, merged: Path) -> None:  # noqa: F811
    """The merged files answer as the adapter does on the base that was not quantised."""
    from peft import PeftModel

    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(whole(model), str(adapter)).eval()(ids).logits
        torch.testing.assert_close(whole(merged)(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_run_on_quantised_weights_resumes_as_such(model: Path, examples: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("bitsandbytes")
    assert train_with(model, examples, tmp_path / "out", "--quantize", "nf4").exit_code == 0
    other = train_with(model, examples, tmp_path / "out", "--quantize", "fp4")
    assert other.exit_code == 2 and "--quantize was nf4, now fp4" in other.output


def test_a_kind_that_does_not_exist_is_told_with_the_nearest(model: Path, examples: Path, tmp_path: Path) -> None:  # noqa: F811
    wrong = train_with(model, examples, tmp_path / "out", "--quantize", "nf5")
    assert wrong.exit_code == 2 and "--quantize nf5" in wrong.output and "nf4" in wrong.output
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_told_before_anything_is_loaded(
    model: Path,  # noqa: F811
    examples: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.cli import check

    find = check.find_spec
    monkeypatch.setattr(check, "find_spec", lambda name: None if name == "hqq" else find(name))
    missing = train_with(model, examples, tmp_path / "out", "--quantize", "hqq4")
    assert missing.exit_code == 2
    assert "Missing: hqq (quantised weights). Install with: pip install hqq" in missing.output


def test_a_broken_package_is_one_line(
    model: Path,  # noqa: F811
    examples: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("hqq")
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)  # importing it raises
    broken = train_with(model, examples, tmp_path / "out", "--quantize", "hqq4")
    assert broken.exit_code == 2 and "--quantize hqq4: hqq cannot do this here" in broken.output
    assert "Choose another of nf4" in broken.output and "hqq8" not in broken.output
