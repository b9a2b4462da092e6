"""Writing an adapter that started from a part of the base weight (PiSSA, OLoRA ...) as a plain LoRA.

Such an adapter adds B A - B0 A0 to the base, where A0, B0 are its first values. That is one LoRA of twice
the rank: [B, -B0] [A; A0].
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import PeftWarning, listing
from ...types import plain
from .init import FIRST

SAMPLER = ".lora_monteclora_sampler."  # for training with the rank that it was made for
RESIDUAL = ("pissa", "olora", "corda", "lora_ga")


def convert(state: Mapping[str, Tensor], initial: Mapping[str, Tensor], config: Any) -> tuple[dict[str, Tensor], Any]:
    """The adapter's tensors and configuration as a plain LoRA for the original base model.

    Arguments:
        state: checkpoint key -> tensor of the trained adapter; A (r, in, ...), B (out, r, ...).
        initial: the same keys, as the adapter was saved before training.
        config: its LoraConfig; a changed copy is returned.

    Raises ValueError if the configuration cannot be written so, or the initial adapter is not of the same
    shape.
    """
    _check(config)
    kept = {k: v for k, v in state.items() if k.rpartition(".")[2] not in FIRST and SAMPLER not in k}
    return joined(kept, initial), _plain_config(config)


def joined(state: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of B A - B0 A0: [A; A0] and [B, -B0]; other tensors as they are.

    Raises ValueError if the initial adapter is not of the same shape.
    """
    wrong = [k for k, v in state.items() if _axis(k) is not None and getattr(initial.get(k), "shape", None) != v.shape]
    if wrong:
        raise ValueError(
            f"The initial adapter does not fit the trained one: {listing(wrong)} are missing or of another shape. Give "
            "the folder where this adapter was saved before its training."
        )
    return {k: _joined(k, v, initial) for k, v in state.items()}


def _check(config: Any) -> None:
    kind = plain(config.peft_type)
    if kind != "LORA":
        raise ValueError(f"path_initial_model_for_weight_conversion is for LoRA adapters, but this one is {kind}.")
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "An adapter with use_rslora and rank_pattern or alpha_pattern cannot be written as a plain LoRA: its "
            "scalings would change. Save it without path_initial_model_for_weight_conversion."
        )
    if getattr(config, "target_parameters", None):
        raise ValueError("Adapters with target_parameters cannot be converted. Save without the conversion.")
    if not str(config.init_lora_weights).lower().startswith(RESIDUAL):
        text = (
            f"init_lora_weights={config.init_lora_weights!r} leaves the base alone; the conversion "
            "doubles its rank only."
        )
        warnings.warn(text, PeftWarning, stacklevel=5)


def _axis(key: str) -> int | None:
    """The rank's axis of a factor: 0 for A, 1 for B, None for every other tensor."""
    *_, last = parts = key.split(".")
    factor = parts[-2] if last == "weight" and len(parts) > 1 else last
    return {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}.get(factor)


def _joined(key: str, now: Tensor, initial: Mapping[str, Tensor]) -> Tensor:
    axis = _axis(key)
    if axis is None:
        return now
    first = initial[key].to(device=now.device, dtype=now.dtype)
    return torch.cat([now, -first if axis else first], dim=axis)


def _plain_config(config: Any) -> Any:
    new = copy.copy(config)
    new.init_lora_weights = True
    new.corda_config = new.lora_ga_config = new.monteclora_config = None
    factor = math.sqrt(2) if config.use_rslora else 2
    new.r, new.lora_alpha = config.r * 2, config.lora_alpha * factor
    new.rank_pattern = {k: v * 2 for k, v in (config.rank_pattern or {}).items()}
    new.alpha_pattern = {k: v * factor for k, v in (config.alpha_pattern or {}).items()}
    grown = {"r": 2, "lora_alpha": factor}
    settings = getattr(config, "module_config", None) or {}
    if settings:
        new.module_config = {
            k: {n: v * grown.get(n, 1) if n in grown else v for n, v in fields.items()}
            for k, fields in settings.items()
        }
    return new
