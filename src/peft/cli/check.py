"""Checks of options that need no model, no data and no torch; each names option, value and cure."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from peft.cli.options import (
    CompareOptions,
    DataOptions,
    EstimateOptions,
    EvalOptions,
    ForesightOptions,
    GenerateOptions,
    TrainOptions,
)
from peft.core.commit import check_writable
from peft.errors import PeftError, nearest

METHODS = ("lora",)
DTYPES = ("auto", "fp32", "bf16")
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora")
QUANTIZED = {  # `--quantize` and the package that does it
    **dict.fromkeys(("nf4", "fp4", "int8"), "bitsandbytes"),
    **dict.fromkeys(("int8-torchao", "int4-torchao", "float8-torchao"), "torchao"),
    **dict.fromkeys(("hqq4", "hqq8"), "hqq"),
}
SUFFIXES = (".jsonl", ".csv", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
PACKAGES = {
    "accelerate": "training",
    "transformers": "language models",
    "torch": "everything",
    "jinja2": "chat templates",
    **dict.fromkeys(QUANTIZED.values(), "quantised weights"),
}


class UsageError(PeftError, ValueError):
    """An option that cannot be right; shown as one message, without a traceback."""


def check_train(options: TrainOptions) -> None:
    """Raise UsageError for the first option of `peft train` that cannot be right."""
    _check_data_options(options)
    _check_model(options.model)
    _check_method(options)
    _check_schedule(options)
    _check_held_out(options)
    _check_output(options)
    check_quantize(options.quantize)
    require("torch", "transformers", "accelerate")


def check_eval(options: EvalOptions) -> None:
    """Raise UsageError for the first option of `peft eval` that cannot be right."""
    _check_data_options(options)
    if options.limit is not None:
        _demand("--limit", options.limit, options.limit >= 1, "at least 1")
    _check_adapter(options.adapter, options.model)
    check_quantize(options.quantize, "none")
    require("torch", "transformers", "accelerate")


def check_generate(options: GenerateOptions) -> None:
    """Raise UsageError for the first option of `peft generate` that cannot be right."""
    _demand("--max-new-tokens", options.max_new_tokens, options.max_new_tokens >= 1, "at least 1")
    _demand("--temperature", options.temperature, options.temperature >= 0, "0 or more")
    _choose("--dtype", options.dtype, DTYPES)
    _check_template(options.template)
    _check_adapter(options.adapter, options.model)
    check_quantize(options.quantize, "none")
    require("torch", "transformers")


def check_compare(options: CompareOptions) -> None:
    """Raise UsageError for the first option of `peft compare` that cannot be right."""
    from peft.cli.compare.recipes import RECIPES

    check_source("--data", options.data)
    if options.eval_data is not None:
        check_source("--eval-data", options.eval_data)
    _check_model(options.model)
    for name in [m.strip() for m in options.methods.split(",") if options.methods != "all"]:
        _choose("--methods", name, ("all", "probe", *RECIPES))
    for flag, value in (("--steps", options.steps), ("--batch", options.batch)):
        _demand(flag, value, value >= 1, "at least 1")
    _demand("--max-length", options.max_length, options.max_length >= 2, "at least 2")
    _demand("--eval-split", options.eval_split, 0 < options.eval_split < 1, "a fraction between 0 and 1")
    check_folder("--output", options.output)
    _demand("--lr-scale", options.lr_scale, 0 < options.lr_scale < float("inf"), "above 0")
    _choose("--dtype", options.dtype, DTYPES)
    require("torch", "transformers")


def check_foresight(options: ForesightOptions) -> None:
    """Raise UsageError for the first option of `peft plan` that cannot be right."""
    _check_model(options.model, "MODEL")
    given = [flag for flag in ("method", "target", "setting") if getattr(options, flag) is not None]
    if options.adapter is not None and given:
        flags = ", ".join("--" + flag.removesuffix("ting") for flag in given)
        raise UsageError(f"--adapter {options.adapter}: its configuration says all of the method. Leave out {flags}.")
    if options.target is not None:
        _check_target(options.target)
    for text in options.setting or ():
        _demand("--set", text, text.partition("=")[0].isidentifier() and "=" in text, "NAME=VALUE")
    require("torch", "transformers")


def check_estimate(options: EstimateOptions) -> None:
    """Raise UsageError for the first option of `peft estimate` that cannot be right."""
    check_foresight(options)
    for flag, value in (("--batch", options.batch), ("--seq", options.seq)):
        _demand(flag, value, value >= 1, "at least 1")
    _choose("--dtype", options.dtype, (*DTYPES, "fp16"))
    if options.quantize is not None:
        _choose("--quantize", options.quantize, ("nf4", "fp4", "int8"))
        require(QUANTIZED[options.quantize])


def require(*packages: str) -> None:
    """Raise UsageError with the install command if an optional package is missing."""
    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        reasons = ", ".join(f"{p} ({PACKAGES.get(p, 'this kind of data')})" for p in missing)
        raise UsageError(f"Missing: {reasons}. Install with: pip install {' '.join(missing)}")


def check_quantize(kind: str | None, *more: str) -> None:
    """Raise UsageError for a `--quantize` that does not exist, or whose package is missing; `more` are no packages."""
    if kind is not None and kind not in more:
        _choose("--quantize", kind, (*QUANTIZED, *more))
        require(QUANTIZED[kind])


def is_file_name(source: str) -> bool:
    """Whether `source` means a local file: it exists, has a data suffix, or cannot be a hub id."""
    return Path(source).exists() or Path(source).suffix in (*SUFFIXES, ".json") or source.count("/") > 1


def check_source(flag: str, source: str) -> None:
    """Raise UsageError unless `source` is a readable kind of file or looks like a hub data set."""
    path = Path(source)
    if not is_file_name(source):
        name = source.partition(":")[0]
        _demand(flag, source, HUB_ID.fullmatch(name) is not None, "a file, or a hub data set ORG/NAME[:split]")
        return
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UsageError(f"{flag} {source}: {what}.{near} Give a {', '.join(SUFFIXES)} file or a hub data set.")
    _choose(f"{flag} {source}: suffix", path.suffix, SUFFIXES)


def _check_data_options(options: DataOptions) -> None:
    _demand("--batch", options.batch, options.batch >= 1, "at least 1")
    _demand("--max-length", options.max_length, options.max_length >= 2, "at least 2")
    _choose("--dtype", options.dtype, DTYPES)
    _check_template(options.template)
    if options.text_column and (options.prompt_column or options.answer_column):
        raise UsageError("--text-column stands instead of --prompt-column and --answer-column: give one kind.")
    check_source("--data", options.data)


def _check_template(template: str | None) -> None:
    if template is not None:
        _demand(
            "--template",
            template,
            template == "chat" or "{prompt}" in template,
            "'chat' or text with {prompt}",
        )
    if template == "chat":
        require("jinja2")


def _check_model(model: str, flag: str = "--model") -> None:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{flag} {model}: the folder has no config.json. Give a saved transformers model.")
    elif path.exists() or not HUB_ID.fullmatch(model):
        raise UsageError(f"{flag} {model}: no such folder, and not a hub id (ORG/NAME). Check the path.")


def _check_target(target: str) -> None:
    _demand("--target", target, all(t.strip() for t in target.split(",")), "all-linear or names")


def _check_method(options: TrainOptions) -> None:
    _choose("--method", options.method, METHODS)
    _demand("--r", options.r, options.r >= 1, "a rank of at least 1")
    if options.alpha is not None:
        _demand("--alpha", options.alpha, options.alpha > 0, "above 0")
    _demand("--dropout", options.dropout, 0 <= options.dropout < 1, "from 0 to below 1")
    _check_target(options.target)
    if not re.fullmatch(r"pissa_niter_\d+", options.init):
        _choose("--init", options.init, INITS)


def _check_schedule(options: TrainOptions) -> None:
    if options.steps is not None and options.epochs is not None:
        raise UsageError(f"--steps {options.steps} and --epochs {options.epochs} exclude each other: give one.")
    if options.steps is not None:
        _demand("--steps", options.steps, options.steps >= 1, "at least 1")
    if options.epochs is not None:
        _demand("--epochs", options.epochs, options.epochs > 0, "above 0")
    _demand("--grad-accum", options.grad_accum, options.grad_accum >= 1, "at least 1")
    _demand("--lr", options.lr, 0 < options.lr < float("inf"), "above 0")
    whole = options.warmup < 1 or options.warmup == int(options.warmup)
    _demand("--warmup", options.warmup, options.warmup >= 0 and whole, "a fraction below 1, or a number of steps")


def _check_held_out(options: TrainOptions) -> None:
    if options.eval_data and options.eval_split:
        raise UsageError("--eval-data and --eval-split exclude each other: give one.")
    if options.eval_data:
        check_source("--eval-data", options.eval_data)
    fraction = as_fraction(options.eval_split)
    if fraction is not None:
        _demand("--eval-split", options.eval_split, 0 < fraction < 1, "a fraction between 0 and 1")
    elif options.eval_split and is_file_name(options.data):
        raise UsageError(f"--eval-split {options.eval_split}: a file has no named splits. Give a fraction like 0.1.")


def as_fraction(text: str | None) -> float | None:
    """The number in `--eval-split`, or None if it is the name of a split."""
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _check_output(options: TrainOptions) -> None:
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite exclude each other: give one.")
    check_folder("--output", options.output)


def check_folder(flag: str, folder: Path) -> None:
    """Raise UsageError for an output that is a file, UnwritableError for a folder that cannot be made or written."""
    if os.path.isfile(folder):
        raise UsageError(f"{flag} {folder}: is a file. Give a folder.")
    check_writable(folder)


def _check_adapter(folder: Path, model: str | None) -> None:
    if not (folder / "adapter_config.json").is_file():
        what = "has no adapter_config.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"--adapter {folder}: {what}. Give a folder written by `peft train`.")
    if model is not None:
        _check_model(model)


def _demand(flag: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{flag} {value}: expected {expected}.")


def _choose(flag: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise UsageError(f"{flag} {value}: expected one of {', '.join(choices)}.{nearest(value, choices)}")
