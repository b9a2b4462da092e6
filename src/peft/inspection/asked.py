"""What an estimate is asked for: the model that is meant, what it is called with, the optimiser."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.towers import KINDS
from ..errors import PeftError, WrongKindError, nearest
from ..types import plain


class EstimateError(PeftError, ValueError):
    """A model, or the run that is asked for, whose memory cannot be told."""


def model_of(model: Any, config: Any, packing: Any, notes: list[str]) -> nn.Module:
    """The model that is meant; of a configuration on the meta device, and of bitsandbytes if it asks for that.

    Arguments:
        model: as `estimate` is given it.
        config: the adapter's, for the task.
        packing: the quantization_config that `estimate` is given, or None.
        notes: what is left out is added to them.
    """
    if isinstance(model, nn.Module):
        if packing is not None:
            raise EstimateError(
                "quantization_config is for a model that is not made yet. Pass the model's configuration."
            )
        return model
    if not isinstance(model, str | os.PathLike) and not hasattr(model, "model_type"):
        raise WrongKindError(
            f"model is a {type(model).__name__}. Pass a torch model, or a configuration of transformers, its "
            "folder or its name."
        )
    import transformers

    try:
        if isinstance(model, str | os.PathLike):
            settings = transformers.AutoConfig.from_pretrained(os.fspath(model))
        else:
            settings = copy.deepcopy(model)
        kind = _class(transformers, settings, config)
        if not (getattr(settings, "architectures", None) or getattr(config, "task_type", None)):
            notes.append(f"the configuration names no class; counted as {kind.__name__}")
        packing, dtype = packing or getattr(settings, "quantization_config", None), settings.dtype or torch.float32
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config
        with torch.device("meta"):
            made = kind._from_config(settings, dtype=dtype)
        return packed(transformers, made, packing, dtype, notes) if packing else made
    except (ImportError, AttributeError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        cause = str(error).strip().partition("\n")[0][:300].rstrip(" .")
        raise EstimateError(f"model={named(model)} cannot be made: {cause}. Pass the model itself.") from error


def named(model: Any) -> str:
    """What to call a model that is given as a folder or name, or as a configuration."""
    return repr(os.fspath(model)) if isinstance(model, str | os.PathLike) else type(model).__name__


def packed(transformers: Any, model: nn.Module, packing: Any, dtype: torch.dtype, notes: list[str]) -> nn.Module:
    """A model on the meta device with bitsandbytes' layers, whose weights wait for being quantised."""
    table = packing if isinstance(packing, Mapping) else packing.to_dict()
    if not (table.get("load_in_4bit") or table.get("load_in_8bit")):
        notes.append("quantization_config is left out: the base is counted in the dtype it is computed in")
        return model
    from transformers.quantizers import AutoHfQuantizer

    if isinstance(packing, Mapping):
        packing = transformers.BitsAndBytesConfig.from_dict(dict(packing))
    AutoHfQuantizer.from_config(packing, pre_quantized=False).preprocess_model(model=model, device_map=None)
    for p in model.parameters():
        if p.is_floating_point() and p.dtype is not dtype and type(p) is not nn.Parameter:
            p.data = p.data.to(dtype)  # as files hold them, which tells in which dtype they are read
    return model


def _class(transformers: Any, settings: Any, config: Any) -> Any:
    """The class of the model: the configuration's own, else of the adapter's task, else what the kind is made for."""
    for name in getattr(settings, "architectures", None) or []:
        if isinstance(found := getattr(transformers, name, None), type) and issubclass(found, nn.Module):
            return found
    task = getattr(config, "task_type", None)
    both = getattr(settings, "is_encoder_decoder", False)
    first = [TASKS[plain(task)]] if task else []
    if any(hasattr(settings, name) for name in KINDS) and first in ([], ["AutoModelForCausalLM"]):
        first = ["AutoModelForImageTextToText", *first]  # with its towers
    for name in [*first, *(OF_BOTH if both else ()), *WHOLE, "AutoModel"]:
        found = getattr(transformers, name)._model_mapping.get(type(settings), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"transformers has no model for {type(settings).__name__}")


def inputs_of(
    model: nn.Module, config: Any, batch: int, seq: int, target_seq: int | None, training: bool
) -> dict[str, Tensor]:
    """What a model of transformers is called with under an adapter, labels included for training."""
    settings, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    takes = inspect.signature(model.forward).parameters
    ids = torch.ones(batch, seq, dtype=torch.int64, device="cpu")
    if main == "pixel_values" and all(hasattr(settings, name) for name in IMAGE):
        size = settings.image_size  # type: ignore[union-attr]
        pixels = size if isinstance(size, tuple | list) else (size, size)
        channels = settings.num_channels  # type: ignore[union-attr]
        found = {main: torch.zeros(batch, channels, *pixels, dtype=torch.float32, device="cpu")}
    elif main == "input_ids":
        found = {main: ids}
    else:
        raise EstimateError(
            f"What {type(model).__name__} is called with is not known. Pass inputs=, such as a dictionary."
        )
    if getattr(settings, "is_encoder_decoder", False) and main == "input_ids":
        ids = torch.ones(batch, target_seq or seq, dtype=torch.int64, device="cpu")
        found["decoder_input_ids"] = ids
    if any(getattr(config, name, None) for name in MANY_TASKS):
        found["task_ids"] = torch.zeros(batch, dtype=torch.int64, device="cpu")
    if training and "use_cache" in takes:
        found["use_cache"] = False  # type: ignore[assignment]
    return {**found, **_labels(model, takes, ids)} if training else found


def _labels(model: nn.Module, takes: Mapping[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """What the model's own loss is computed from; nothing where it has none."""
    each = torch.zeros(len(ids), dtype=torch.int64, device="cpu")
    if "start_positions" in takes:
        return {"start_positions": each, "end_positions": each}
    if "labels" not in takes:
        return {}
    if not any(kind in type(model).__name__ for kind in PER_TEXT):
        return {"labels": ids}
    return {"labels": each.float() if model.config.num_labels == 1 else each}  # type: ignore[union-attr]


def checkpoint(model: nn.Module) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise EstimateError(
            f"gradient_checkpointing=True, but {type(model).__name__} has none of transformers. Pass False, or a model "
            "that checkpoints by itself."
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]


class EightBit(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW: two bytes a number and a scale for 256, in full below 4,096 numbers."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state; the step itself works in place."""
        for p in (
            p for group in self.param_groups for p in group["params"] if p.grad is not None and not self.state[p]
        ):
            small = p.numel() < 4096
            for name in ("state1", "state2"):
                self.state[p][name] = torch.zeros_like(p, dtype=torch.float32 if small else torch.uint8)
                self.state[p][f"{name}_scale"] = p.new_zeros(0 if small else -(-p.numel() // 256), dtype=torch.float32)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adamw_8bit": lambda params: EightBit(params, {}),
    "adafactor": torch.optim.Adafactor,
}


def optimizer_of(optimizer: Any) -> Callable[..., Any]:
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        return optimizer
    if optimizer not in (*OPTIMIZERS,):
        raise EstimateError(
            f"optimizer={optimizer!r} is not known{nearest(str(optimizer), OPTIMIZERS)}. Pass {', '.join(OPTIMIZERS)}, "
            "or a class of torch.optim."
        )
    return OPTIMIZERS[optimizer]


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as configurations name their number
MANY_TASKS = ("num_tasks", "n_tasks")  # as configurations of adapters name their number, if each row has its task
IMAGE = ("num_channels", "image_size")
PER_TEXT = ("SequenceClassification", "ImageClassification")  # classes of models that have one label for each input
OF_BOTH = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")  # with an encoder and a decoder
WHOLE = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForImageClassification", *OF_BOTH)
TASKS = {
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "CAUSAL_LM": "AutoModelForCausalLM",
}
