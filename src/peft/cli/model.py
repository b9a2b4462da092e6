"""Base models for the commands: configuration first, weights only when everything else has been checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from peft.cli.check import UsageError, check_quantize
from peft.cli.options import TrainOptions
from peft.cli.state import kept_quantize

T = TypeVar("T")


def lora_config(options: TrainOptions) -> Any:
    """The `LoraConfig` that the options describe; alpha is 2 x r unless given."""
    from peft import LoraConfig

    names = [name.strip() for name in options.target.split(",")]
    values: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": options.r,
        "lora_alpha": _whole(2 * options.r if options.alpha is None else options.alpha),
        "lora_dropout": options.dropout,
        "target_modules": "all-linear" if names == ["all-linear"] else names,
        "use_dora": options.dora,
        "use_rslora": options.rslora,
        "init_lora_weights": True if options.init == "default" else options.init,
    }
    return LoraConfig(**values)


CONFIGS: dict[str, Callable[[TrainOptions], Any]] = {"lora": lora_config}


def method_config(options: TrainOptions) -> Any:
    """The adapter configuration of `--method`."""
    return CONFIGS[options.method](options)


def base_name(model: str) -> str:
    """A hub id as it is, a folder as an absolute path, so that the adapter finds its base from anywhere."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def load_tokenizer(model: str) -> Any:
    """The tokenizer saved beside the model."""
    from transformers import AutoTokenizer

    return load("--model", model, lambda: AutoTokenizer.from_pretrained(model))


def meta_model(model: str) -> nn.Module:
    """The architecture of `model` without weights, in a second and without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = load("--model", model, lambda: AutoConfig.from_pretrained(model))
    with torch.device("meta"):
        return load("--model", model, lambda: AutoModelForCausalLM.from_config(config))


def load_model(model: str, dtype: str, quantize: str | None = None) -> nn.Module:
    """The base model with its weights, in `dtype` (auto, fp32 or bf16), on the CPU; quantised, on its device."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    wanted = torch_dtype(dtype)

    def read(**more: Any) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(model, dtype=wanted, **more)

    if quantize is None:
        return load("--model", model, read)
    from peft.cli.quantize import load_quantized

    load("--model", model, lambda: AutoConfig.from_pretrained(model))  # its own errors come first
    return load_quantized(quantize, wanted, read)


def load_adapter(
    adapter: Path, model: str | None, dtype: str, base_only: bool, quantize: str | None = None
) -> tuple[nn.Module, Any]:
    """Base model with a saved adapter (or alone), in eval mode, and its tokenizer; `quantize` as for the commands."""
    from peft import PeftConfig, PeftModel

    name = (
        model
        or load("--adapter", str(adapter), lambda: PeftConfig.from_pretrained(str(adapter))).base_model_name_or_path
    )
    if not name:
        raise UsageError(f"--adapter {adapter}: does not name its base model. Give it with --model.")
    kind = quantize or kept_quantize(adapter)
    check_quantize(kind, "none")
    tokenizer, base = load_tokenizer(name), load_model(name, dtype, None if kind == "none" else kind)
    if not base_only:
        base = load("--adapter", str(adapter), lambda: PeftModel.from_pretrained(base, str(adapter)))
    return base.eval(), tokenizer


def make_accelerator() -> Any:
    """accelerate's view of the devices; without any, processes started by torchrun work together on the CPU."""
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.accelerator.is_available())


def end_together(accelerator: Any) -> None:
    """Let all processes end together: one that leaves early breaks the connection that others still use."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


def torch_dtype(name: str) -> torch.dtype:
    """The dtype for fp32, bf16, or auto: bf16 where the hardware computes in it, else fp32."""
    if name == "auto":
        name = "bf16" if computes_bf16() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def computes_bf16() -> bool:
    """Whether the GPU, or else the CPU (avx512_bf16, AMX), has bf16 arithmetic; without it bf16 is slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, ask, bool)() for ask in asks)


def load(flag: str, name: str, load: Callable[[], T]) -> T:
    """`load()`, with the errors of a missing or broken folder or hub id as a UsageError."""
    try:
        return load()
    except (OSError, ValueError, KeyError) as problem:
        offline = " (the hub is switched off: HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise UsageError(f"{flag} {name}: cannot be loaded{offline}. {reason}") from problem


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number
