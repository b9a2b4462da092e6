"""`peft plan` and `peft estimate`: of a folder with nothing but a configuration, by name of any method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

import peft
from peft.cli.app import build_app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configuration")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=128)
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(folder)
    return folder


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), [str(a) for a in arguments])


def told(*arguments: object) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


CHOICES: list[tuple[str, Any]] = [
    ("", peft.LoraConfig()),
    ("--target all-linear --set r=16", peft.LoraConfig(r=16, target_modules="all-linear")),
    (
        "--target q_proj,up_proj --set use_dora=true",
        peft.LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True),
    ),
    ('--set target_modules=".*[qv]_proj" --set r=3', peft.LoraConfig(target_modules=".*[qv]_proj", r=3)),
    ("--set target_modules=.*[qv]_proj", peft.LoraConfig(target_modules=".*[qv]_proj")),
    ('--set rank_pattern={"v_proj":2}', peft.LoraConfig(rank_pattern={"v_proj": 2})),
    ("--method ia3", peft.IA3Config()),
    ("--method LOKR --target o_proj", peft.LoKrConfig(target_modules=["o_proj"])),
    ("--method vera --set projection_prng_key=3", peft.VeraConfig(projection_prng_key=3)),
]


@pytest.mark.parametrize(("flags", "config"), CHOICES)
def test_plan_tells_what_the_function_tells(model: Path, flags: str, config: Any) -> None:
    want, found = peft.plan(str(model), config), told("plan", model, *flags.split())
    assert [(r["path"], r["rank"], r["trainable"]) for r in found["targets"]] == [
        (r.path, r.rank, r.trainable) for r in want.rows
    ]
    assert (found["trainable"], found["base_parameters"]) == (want.trainable, want.base_parameters)
    assert found["notes"] == want.notes and len(found["skipped"]) == len(want.skipped)
    shown = invoke("plan", model, *flags.split())
    assert shown.exit_code == 0 and want.summary in shown.stdout


def test_layers_that_are_alike_are_one_line(model: Path) -> None:
    shown = invoke(
        "plan", model, "--target", "all-linear", "--set", "r=16", "--set", 'rank_pattern={"1.mlp.up_proj": 4}'
    )
    assert shown.stdout.count("mlp.up_proj") == 1 and "4 to 16" in shown.stdout
    assert "Skipped: lm_head: output head." in shown.stdout
    assert "Note: lora_alpha is 8" in shown.stdout


def test_the_configuration_of_an_adapter(model: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["k_proj"], modules_to_save=["lm_head"])
    config.save_pretrained(tmp_path)
    found = told("plan", model, "--adapter", tmp_path)
    assert found["trainable"] == peft.plan(str(model), config).trainable
    assert told("estimate", model, "--adapter", tmp_path) == peft.estimate(str(model), config).to_dict()


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        ([], {}),
        (["--batch", "2", "--seq", "32", "--optimizer", "sgd"], {"batch": 2, "seq": 32, "optimizer": "sgd"}),
        (["--gradient-checkpointing"], {"gradient_checkpointing": True}),
        (["--inference", "--seq", "16"], {"training": False, "seq": 16}),
    ],
)
def test_estimate_tells_what_the_function_tells(model: Path, flags: list[str], more: dict[str, Any]) -> None:
    want = peft.estimate(str(model), peft.LoraConfig(r=4), **more)
    assert told("estimate", model, "--set", "r=4", *flags) == want.to_dict()
    shown = invoke("estimate", model, "--set", "r=4", *flags)
    assert shown.exit_code == 0 and str(want) in shown.stdout


def test_estimate_in_other_dtypes_and_few_bits(model: Path) -> None:
    plain, half = (told("estimate", model, "--dtype", d)["base"] for d in ("fp32", "bf16"))
    assert plain == 2 * half
    pytest.importorskip("bitsandbytes")
    assert told("estimate", model, "--quantize", "nf4")["base"] < half


def test_prompts_are_estimated_and_not_planned(model: Path) -> None:
    flags = ["--method", "prompt_tuning", "--set", "num_virtual_tokens=4", "--set", "task_type=CAUSAL_LM"]
    assert told("estimate", model, *flags)["adapter"] == 4 * 64 * 4
    refused = invoke("plan", model, *flags)
    assert refused.exit_code == 2 and "adapts no modules" in refused.stderr


@pytest.mark.parametrize(
    ("command", "flags", "text"),
    [
        ("plan", ["--target", "q_prok"], "Did you mean 'q_proj'"),
        ("plan", ["--target", "q_proj,,v_proj"], "all-linear or names"),
        ("plan", ["--method", "lorra"], "Did you mean 'LORA'"),
        ("plan", ["--set", "lora_alfa=3"], "Did you mean 'lora_alpha'"),
        ("plan", ["--set", "r"], "expected NAME=VALUE"),
        ("plan", ["--set", "r=many"], "`r` must be an integer"),
        ("plan", ["--adapter", "nowhere"], "adapter_config.json"),
        ("plan", ["--adapter", "nowhere", "--method", "ia3", "--set", "r=2"], "Leave out --method, --set"),
        ("estimate", ["--batch", "0"], "--batch 0: expected at least 1"),
        ("estimate", ["--optimizer", "adam"], "optimizer='adam'"),
        ("estimate", ["--quantize", "nf5"], "Did you mean 'nf4'"),
        ("estimate", ["--dtype", "fp64"], "expected one of auto, fp32, bf16, fp16"),
    ],
)
def test_wrong_options_are_named(model: Path, command: str, flags: list[str], text: str) -> None:
    result = invoke(command, model, *flags)
    assert result.exit_code == 2 and text in result.stderr
    assert not result.stdout


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    result = invoke("plan", tmp_path)
    assert result.exit_code == 2 and "MODEL" in result.stderr and "no config.json" in result.stderr
