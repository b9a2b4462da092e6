"""LoRA-GA: factors along the gradient of the full weight.

    G = dL/dW over some batches, G = U S V';   A and B take different ones of its first 2 r singular vectors

so that the first steps of training move W as full fine-tuning would. The base stays as it is: the first factors are
held aside. B's columns are weighed by S, as the peer does and files assume; the paper's are not. Source: Wang et al.
2024, arXiv 2407.05000, eq. 7 and theorem 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core import storage
from ...core.draw import triplets
from ...core.seen import evaluating
from ...errors import PeftWarning
from .calibration import Spot, read, spots, write

NAME = "_peft_loraga_grad"


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Measure a base model for `init_lora_weights="lora_ga"`; then call `get_peft_model` with the same configuration.

    Arguments:
        model: the base model; its gradients, flags and mode are afterwards as before.
        lora_config: says which weights, in its `lora_ga_config` how.
        train_step: runs forward and backward, once or more often; what it does to gradients afterwards does not matter.
        cache_file: read if it exists, else written.

    Raises ValueError without `lora_ga_config`, for quantised weights, and if some weight got no gradient.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError("preprocess_loraga needs `lora_ga_config` in the LoraConfig: lora_ga_config=LoraGAConfig().")
    places = spots(model, lora_config)
    for spot in places:
        if type(storage.of(spot.module, spot.view.name)) is not storage.Storage or _parameter(spot) is None:
            raise ValueError(
                f"LoRA-GA needs the gradient of {spot.path!r}, which is quantised or computed at each call. Leave it "
                "out (`exclude_modules`), or measure a base model in a floating-point dtype."
            )
    found = read(cache_file, "cache_file")
    if found is None:
        found = _measured(model, places, train_step)
        write(cache_file, found)
    for spot in places:
        G, shape = found.get(spot.file_key(NAME)), _parameter(spot).shape
        if G is None or G.shape != shape:
            text = "no gradient" if G is None else f"a gradient of shape {tuple(G.shape)}"
            raise ValueError(
                f"There is {text} for {spot.path!r}, whose weight is {tuple(shape)}: `train_step` has to use every "
                "target in its loss, and cache_file has to be of the same model and targets."
            )
    for spot in places:
        spot.set(NAME, found[spot.file_key(NAME)].to(_parameter(spot).device))


def factors(spot: Spot, r: int, scaling: float, W: Tensor) -> tuple[Tensor, Tensor]:
    """A (..., r, I) and B (..., O, r) from the stored gradient; W is the weight."""
    options = spot.settings.lora_ga_config
    G = spot.view.matrix(spot.module, spot.get(NAME)).float()
    if 2 * r > min(G.shape[-2:]):
        raise ValueError(
            f"init_lora_weights='lora_ga' takes 2 r = {2 * r} directions, but {spot.path!r} is {tuple(G.shape[-2:])} "
            f"and has only {min(G.shape[-2:])}. Lower r, or give this layer its own rank with rank_pattern."
        )
    U, S, Vh = _triplets(G, 2 * r, min(4 * r, *G.shape[-2:]))
    up, down = _directions(options.direction, r)
    A, B, S = Vh[..., down, :], U[..., :, up] * S[..., None, up], S[..., up]
    if options.scale == "stable":
        stored = G.shape[-1] if spot.view.label == "Linear" and spot.view.out_axis(spot.module) else G.shape[-2]
        B = B * (stored**0.25 / options.stable_gamma**0.5)  # of a Conv1D the first axis, as the peer's files assume
    elif options.scale == "gd_scale":
        A, B = A / scaling, B / scaling
    elif options.scale == "weight_svd":
        largest = _triplets(W.detach().float(), 1, min(r, *W.shape[-2:]))[1][..., 0]
        first = S[..., 0]
        B = B * torch.where(first > 0, largest / first.clamp_min(1e-30), 1.0)[..., None, None]
    return A.contiguous(), B.contiguous()


def missing(path: str) -> None:
    """Say that a layer has no gradient, so that it starts as a plain one."""
    warnings.warn(
        f"init_lora_weights='lora_ga' found no gradient at {path!r}, so its factors start as with True. Call "
        "preprocess_loraga on the base model first. A saved adapter whose file lacks `lora_first_A` needs it, too, "
        "unless it is saved with `path_initial_model_for_weight_conversion`.",
        PeftWarning,
        stacklevel=2,
    )


def _parameter(spot: Spot) -> Any:
    return spot.module._parameters.get(spot.view.name)


def _directions(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which singular vectors B and A take."""
    every = torch.arange(2 * r, device="cpu")
    if direction == "ArBr":
        return every[0::2], every[1::2]
    if direction == "A2rBr":
        return every[:r], every[r:]
    if direction == "ArB2r":
        return every[r:], every[:r]
    chosen = torch.randperm(2 * r, generator=torch.Generator().manual_seed(0), device="cpu")[:r]
    return chosen, chosen


def _triplets(M: Tensor, n: int, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n largest singular triplets: exact, or from a sketch of q columns that is the same at every load."""
    if q >= min(M.shape[-2:]):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        U, S, Vh = triplets(M, q, iterations=4, seed=0)
    U, S, Vh = U[..., :n], S[..., :n], Vh[..., :n, :]
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1, 1)  # the same on every machine
    return U * sign, S, Vh * sign.mT


def _measured(model: nn.Module, places: list[Spot], train_step: Callable[[], None]) -> dict[str, Tensor]:
    """The mean over backward passes of each target's gradient, taken once it is there, so that it is held once."""
    sums: dict[int, Tensor] = {}
    passes: dict[int, int] = {}

    def take(weight: Tensor) -> None:
        if weight.grad is not None:
            G, key = weight.grad.detach().float(), id(weight)
            sums[key], passes[key] = (sums[key] + G if key in sums else G), passes.get(key, 0) + 1
            weight.grad = None

    weights = {id(_parameter(spot)): _parameter(spot) for spot in places}  # tied ones once
    with evaluating(model, training=True), _only_targets(model, list(weights.values())):
        handles = [weight.register_post_accumulate_grad_hook(take) for weight in weights.values()]
        try:
            with torch.enable_grad():
                train_step()
        finally:
            for handle in handles:
                handle.remove()
    keys = {spot.file_key(NAME): id(_parameter(spot)) for spot in places}
    return {name: sums[key] / passes[key] for name, key in keys.items() if key in sums}


@contextmanager
def _only_targets(model: nn.Module, targets: list[nn.Parameter]) -> Iterator[None]:
    """Gradients of the targets only; everything is as before afterwards."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in flags:
            p.requires_grad_(False)
            p.grad = None
        for p in targets:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag, grad in flags:
            p.requires_grad_(flag)
            p.grad = grad
