"""`--quantize`: the base model's weights in few bits, with the packages that do it."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from peft.cli.check import QUANTIZED, UsageError

KEPT = ("lm_head",)  # what no package quantises either


class Kind(NamedTuple):
    """How weights are quantised: by transformers while it loads, or afterwards, layer by layer."""

    config: Callable[[torch.dtype], Any] | None = None
    layer: Callable[[nn.Linear, torch.dtype], nn.Module] | None = None


def _bitsandbytes(**settings: Any) -> Kind:
    def config(dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        import_module("bitsandbytes")
        own = {"bnb_4bit_compute_dtype": dtype} if settings.get("load_in_4bit") else {}
        return BitsAndBytesConfig(**settings, **own)

    return Kind(config=config)


def _torchao(name: str, settings: Callable[[], dict[str, Any]] = dict) -> Kind:
    def config(dtype: torch.dtype) -> Any:
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(import_module("torchao.quantization"), name)(**settings()))

    return Kind(config=config)


def _groups() -> dict[str, Any]:
    groups = import_module("torchao.quantization").PerGroup(32)
    return {"weight_dtype": torch.int4, "granularity": groups}  # type: ignore[attr-defined]


def _hqq(bits: int) -> Kind:
    def layer(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
        quantize = import_module("hqq.core.quantize")
        settings = quantize.BaseQuantizeConfig(nbits=bits, group_size=64)
        device = str(linear.weight.device)
        made: nn.Module = quantize.HQQLinear(linear, settings, compute_dtype=dtype, device=device)
        return made

    return Kind(layer=layer)


KINDS: dict[str, Kind] = {
    "nf4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": _bitsandbytes(load_in_8bit=True),
    "int8-torchao": _torchao("Int8WeightOnlyConfig"),
    "int4-torchao": _torchao("IntxWeightOnlyConfig", _groups),
    "float8-torchao": _torchao("Float8WeightOnlyConfig"),
    "hqq4": _hqq(4),
    "hqq8": _hqq(8),
}


def load_quantized(kind: str, dtype: torch.dtype, read: Callable[..., nn.Module]) -> nn.Module:
    """A model whose linear layers are quantised, ready for adapters, on this process's device.

    Arguments:
        kind: a name of `KINDS`.
        dtype: in which the layers compute.
        read: loads the model; it takes further arguments of transformers' `from_pretrained`.

    Raises UsageError where the package or this machine cannot do it.
    """
    from peft import prepare_model_for_kbit_training

    how = KINDS[kind]
    try:
        if how.config is not None:
            model = read(quantization_config=how.config(dtype), device_map={"": _device()})
        else:
            model = read().to(_device())
            assert how.layer is not None, "a kind is one or the other"
            _layer_by_layer(model, how.layer, dtype)
            model.quantization_method = QUANTIZED[kind]  # type: ignore[assignment]  # as loading would have noted
    except UsageError:
        raise
    except Exception as problem:  # what packages raise where a device or a release does not fit
        reason = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise UsageError(
            f"--quantize {kind}: {QUANTIZED[kind]} cannot do this here ({reason.strip()}). Choose another of "
            f"{', '.join(k for k in KINDS if QUANTIZED[k] != QUANTIZED[kind])}, or leave --quantize out."
        ) from problem
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _layer_by_layer(model: nn.Module, make: Callable[[nn.Linear, torch.dtype], nn.Module], dtype: torch.dtype) -> None:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path.rpartition(".")[2] not in KEPT:
            model.set_submodule(path, make(module, dtype))


def _device() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    assert kind is not None, "it is available"
    return f"{kind.type}:{os.environ.get('LOCAL_RANK', 0)}"
