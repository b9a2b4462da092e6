"""Intruder dimensions: directions that fine-tuning has put on top of a weight's own, made smaller.

    W' = W + s B A = sum s_i u_i v_i';  u_i (i among the first k) is an intruder if |cos(u_i, u0_j)| < eps for all j
    new update = s B A + (lambda - 1) sum over intruders of s_i u_i v_i', cut to the rank that the layer has

u0 are the left singular vectors of W. They go with forgetting of what the base model knew. Source: Shuttleworth et al.
2024, arXiv 2410.21228, algorithm 1 and section 6.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.layer import tuner_layers
from ..core.sharded import adapters_whole, put
from ..errors import check_adapters
from ..names import check_adapter_name
from ..types import plain
from .combine import Result
from .factors import Spectrum, exactly
from .update import Update, updates
from .weighted import Added, write, write_rest


def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] = print,
) -> None:
    """Add a copy of a LoRA adapter whose intruder dimensions are scaled down, and activate it.

    Arguments:
        peft_model: the model.
        old_adapter_name: the adapter, a plain LoRA; it stays as it is.
        new_adapter_name: the name of the copy.
        top_k: how many of the largest singular vectors of a merged weight are looked at.
        threshold_epsilon: the largest cosine with a vector of the base weight that an intruder has.
        mitigation_lambda: what the intruders' singular values are multiplied with; 1 leaves them.
        logging_sink: is told how many intruders each layer has.

    Raises ValueError for another method, unknown or taken names, and numbers without a meaning; the model is then
    unchanged.
    """
    tuner = peft_model.base_model
    _check(tuner, old_adapter_name, new_adapter_name)
    _check_numbers(top_k, threshold_epsilon, mitigation_lambda)
    with adapters_whole(peft_model):
        results: dict[str, Result | None] = {}
        for path, (update,) in updates(tuner.model, {old_adapter_name: 1.0}).items():
            if update.factors is None:
                raise ValueError(f"The adapter at {update.p.path!r} is no plain LoRA, and its update no product B A.")
            results[path] = _reduced(update, top_k, threshold_epsilon, mitigation_lambda, logging_sink)
        config = copy.copy(tuner.peft_config[old_adapter_name])
        with Added(tuner, new_adapter_name, config):
            for path, layer in tuner_layers(tuner.model):
                if path in results:
                    _write(layer, old_adapter_name, new_adapter_name, results[path])
            write_rest(tuner, new_adapter_name, {old_adapter_name: 1.0})
    peft_model.set_adapter(new_adapter_name)


def _check(tuner: Any, old: str, new: str) -> None:
    configs = tuner.peft_config
    check_adapters([old], configs)
    if configs[old].peft_type != "LORA":
        kind = plain(configs[old].peft_type)
        raise ValueError(f"The adapter {old!r} is {kind}; intruder dimensions are reduced for LoRA only.")
    check_adapter_name(new)
    if new in configs:
        raise ValueError(f"There is an adapter {new!r} already. Delete it first, or choose another new_adapter_name.")


def _check_numbers(top_k: Any, eps: Any, factor: Any) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k={top_k!r} is no number of vectors. Give a whole number of at least 1.")
    if not 0 <= eps <= 1:
        raise ValueError(f"threshold_epsilon={eps!r} is no cosine. Give a number in [0, 1].")
    if not math.isfinite(factor):
        raise ValueError(f"mitigation_lambda={factor!r} is no factor. Give a finite number; 1 changes nothing.")


@torch.no_grad()
def _reduced(update: Update, top_k: int, eps: float, factor: float, tell: Callable[[str], Any]) -> Result | None:
    """The layer's new update, or None if it has no intruder."""
    D = exactly(update.dense())
    W = update.form.wide(exactly(update.p.layer.original_weight()))
    pairs = zip(W.reshape(-1, *W.shape[-2:]), D.reshape(-1, *D.shape[-2:]), strict=True)
    changes = [_intruders(w, w + d, top_k, eps) for w, d in pairs]
    count = sum(n for n, _ in changes)
    tell(f"{update.p.path}: {count} intruder dimension{'' if count == 1 else 's'}")
    if not count:
        return None
    new = D + (factor - 1) * torch.stack([change for _, change in changes]).view(D.shape)
    cut = Spectrum((new / update.scale).float()).cut(update.rank, torch.float32, balanced=True)
    return Result(cut.pair.scaled(update.scale), cut.error, bias=update.bias())


def _intruders(W: Tensor, merged: Tensor, top_k: int, eps: float) -> tuple[int, Tensor]:
    """How many of the largest left vectors of the merged weight are none of W's, and their part of it."""
    base = torch.linalg.svd(W, full_matrices=False)[0]
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    U, S, Vh = U[:, :top_k], S[:top_k], Vh[:top_k]
    new = (base.mT @ U).abs().amax(0) < eps
    return int(new.sum()), (U * (S * new)) @ Vh


def _write(layer: Any, old: str, new: str, result: Result | None) -> None:
    if result is not None:
        write(layer.adapters[new], result)
        return
    for source, target in zip(layer.slots(old), layer.slots(new), strict=True):
        put(target.tensor, source.tensor)
