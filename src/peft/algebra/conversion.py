"""Any adapter that changes weights written as a plain LoRA: exactly where its update has the rank, else truncated."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.base_state import model_below
from ..core.checkpoint import adapter_config, walk
from ..core.files import staged, write_weights
from ..core.sharded import adapters_whole
from ..core.tokens import TokenRows
from ..core.wrappers import AuxiliaryTrainingWrapper
from ..errors import PeftWarning
from ..methods.lora.config import LoraConfig
from ..methods.lora.model import LoraModel
from ..persist import for_file, prepare_folder
from ..types import plain
from .combine import Result
from .factors import Pair, Spectrum
from .lora import biases, checked_targets, even, parts, plain_config, target_of
from .update import Form, Update, updates
from .weighted import Report


class Conversion(NamedTuple):
    """A LoRA: its configuration, its tensors by checkpoint key, and what it leaves out of the original's update."""

    config: LoraConfig
    state: dict[str, Tensor]
    report: Report

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write it to a folder, from which `PeftModel.from_pretrained` loads it."""
        save(path, self.config, self.state)


def to_lora(model: nn.Module, rank: float, adapter_name: str = "default", progressbar: bool = False) -> Conversion:
    """An adapter as a LoRA with the scaling 1; the model is unchanged.

    Arguments:
        model: a PeftModel, or a model with injected adapters.
        rank: the rank of every layer, a whole number; or the share of the squared norm of each layer's update to keep,
            in (0, 1], for ranks that differ. Where the factors of the update are known and small enough, they are
            taken as they are.
        adapter_name: the adapter.
        progressbar: show progress.

    Raises TypeError for an adapter that changes no weights, ValueError for a rank that cannot be or trained biases.
    """
    check_rank(rank)
    with adapters_whole(model):
        return _as_lora(model, rank, adapter_name, progressbar)


def _as_lora(model: nn.Module, rank: float, adapter_name: str, progressbar: bool) -> Conversion:
    root, config = _source(model, adapter_name)
    layers = updates(model, {adapter_name: 1.0}, tokens=_kind(config) == "TRAINABLE_TOKENS")
    if not layers or updates(model, {adapter_name: 1.0}, whole=True):
        raise TypeError(
            f"The adapter {adapter_name!r} ({_kind(config)}) does not change weights: it is no sum W + B A."
        )
    if any(not u.method.mergeable for (u,) in layers.values()):
        raise TypeError(f"The adapter {adapter_name!r} depends on its input: no W + B A is the same function.")
    new = lora_of(root, config, rank, layers, progressbar)
    if not new.report.ranks or not any(new.report.ranks.values()):
        raise ValueError(f"The adapter {adapter_name!r} changes nothing: every update is zero.")
    return new._replace(state={**new.state, **_others(model, adapter_name)})


def lora_of(
    root: nn.Module,
    source: Any,
    rank: float,
    layers: dict[str, list[Update]],
    progressbar: bool = False,
    at_most: bool = False,
) -> Conversion:
    """The LoRA of some layers' updates, one for each; layers whose update is zero are left out.

    Arguments:
        root: the model in which the configuration will select the layers.
        source: the configuration whose other fields are kept.
        rank: as for `to_lora`.
        layers: {path of a layer in the model: its update, in a list}.
        progressbar: show progress.
        at_most: a layer that cannot have the rank gets all that it can.
    """
    results = {path: _room(_convert(found[0], rank, at_most)) for path, found in _progress(layers, progressbar)}
    results = even(layers, results)
    kept = {path: found for path, found in layers.items() if results[path].pair.rank or path in parts(layers)}
    report = Report()
    for path, found in layers.items():
        report.add(found[0].p.path, results[path], found[0].form.groups)
    if not kept:
        return Conversion(source, {}, report)
    new = _config(root, source, rank, kept, results, report)
    doubled = {u.p.path for (u,) in kept.values()}
    state = {
        k: t
        for path, (u,) in kept.items()
        for k, t in _tensors(path, u, results[path], new, _factor(u, target_of(u) in doubled))
    }
    return Conversion(new, state, report)


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter as a LoRA: its configuration, and its tensors by checkpoint key. Warns if more than 1 % is left out.

    Arguments: as for `to_lora`; `compile_kwargs` is kept for compatibility: compiling gains a decomposition nothing.
    """
    new = to_lora(model, rank, adapter_name, progressbar)
    new.report.tell("Give a larger rank, or a share of the squared norm to keep, such as rank=0.9999.")
    return new.config, new.state


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:
    """Convert an adapter and save it as a LoRA in the folder `path`; further arguments as for `convert_to_lora`."""
    config, state = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    peft_model: Any = model
    save(path, for_file(peft_model, config) if hasattr(model, "get_base_model") else config, state)


def save(path: str | os.PathLike[str], config: Any, state: dict[str, Tensor]) -> None:
    """Write an adapter's configuration and tensors to a folder, both or neither."""
    with staged(prepare_folder(path, sweep=True)) as stage:
        write_weights(state, stage)
        config.save_pretrained(stage)


def check_rank(rank: float) -> None:
    """Raise ValueError for what is neither a rank nor a share."""
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not (whole and rank > 0) and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(
            f"rank={rank!r} is no rank. Give a whole number of at least 1, or the share of the squared norm to keep in "
            "(0, 1]."
        )


def _source(model: nn.Module, name: str) -> tuple[nn.Module, Any]:
    config = adapter_config(model, name)
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"The adapter {name!r} trained biases of the base model (bias={config.bias!r}), which a LoRA file cannot "
            "hold for another method. Convert an adapter with bias='none'."
        )
    if _kind(config) == "LORA":
        warnings.warn(f"The adapter {name!r} is a LoRA already; it is converted to another rank.", PeftWarning, 4)
    root: Any = model_below(model)
    return getattr(root, "model", root) if hasattr(root, "inject_adapter") else root, config


def _kind(config: Any) -> str:
    return plain(config.peft_type)


def _progress(layers: dict[str, Any], show: bool) -> Iterator[tuple[str, Any]]:
    from ..core.unload import progress

    yield from progress(list(layers.items()), show, "Converting to LoRA")


def _convert(update: Update, rank: float, at_most: bool = False) -> Result:
    """One layer: its known factors, or the best ones of the rank."""
    groups = update.form.groups
    pair = update.factors.scaled(update.scale) if update.factors is not None else None
    matrix = update.dense() if pair is None else pair
    size = min(matrix.B.shape[-2], matrix.A.shape[-1]) if isinstance(matrix, Pair) else min(matrix.shape[-2:])
    bias = update.bias()
    wanted = None
    if isinstance(rank, int):
        wanted = min(math.ceil(rank / groups), size) if at_most else math.ceil(rank / groups)
        if pair is not None and pair.rank <= wanted:
            return Result(pair, bias=bias)
        if wanted > size:
            raise ValueError(
                f"rank={rank} is more than the update of {update.p.path!r} can have, {size * groups}. Use at most that."
            )
    spectrum = Spectrum(matrix, wanted, energy=rank if wanted is None else None)
    r = spectrum.rank(rank) if wanted is None else wanted
    cut = spectrum.cut(r, torch.float32)
    enough = spectrum.rank(1 - 1e-4) if spectrum.complete and cut.error > 0.01 else None
    return Result(cut.pair, cut.error, enough, bias)


def _room(result: Result) -> Result:
    """The result with a rank of its own where the bias is all that changes."""
    if result.pair.rank or result.bias is None or not result.bias.count_nonzero():
        return result
    return result._replace(pair=result.pair.padded(1))


def _config(
    model: nn.Module,
    source: Any,
    rank: float,
    kept: dict[str, list[Update]],
    results: dict[str, Result],
    report: Report,
) -> LoraConfig:
    ranks = {found[0].p.path: report.ranks[found[0].p.path] for found in kept.values()}
    shared = next((results[path].pair.rank for path in parts(kept)), None)
    usual = shared or (rank if isinstance(rank, int) else None)
    changes: dict[str, Any] = {"lora_dropout": 0.0, **biases(kept, results)}
    if getattr(source, "target_modules_to_tie", None) or _kind(source) == "TRAINABLE_TOKENS":
        changes["ensure_weight_tying"] = False  # decompositions of a matrix and of its transpose are not tied
    config: Any = plain_config([source], ranks, usual, **changes)
    zero = {found[0].p.path for found in kept.values()} ^ set(report.ranks)
    if zero:
        config.exclude_modules = zero
    return checked_targets(model, config, (found[0] for found in kept.values()))


def _tensors(
    path: str, update: Update, result: Result, config: LoraConfig, times: float
) -> Iterator[tuple[str, Tensor]]:
    view = update.p.layer.view
    A, B = Form(update.p.layer).held(result.pair)
    stem, ending = f"{path}.lora_{view.infix}" if path else f"lora_{view.infix}", "" if view.infix else ".weight"
    yield f"{stem}A{ending}", (A / times).contiguous()
    yield f"{stem}B{ending}", B.contiguous()
    if config.lora_bias and view.bias_name:
        bias, lead = result.bias, view.shape(update.p.layer.get_base_layer())[:-2]
        key = f"{stem}bias" if view.infix else f"{stem}B.bias"
        yield key, B.new_zeros(*lead, B.shape[0]) if bias is None else bias.to(B.dtype)


def _factor(update: Update, packed: bool) -> float:
    """What a LoRA in this place is multiplied with: the out-projection beside packed attention weights is doubled."""
    inside = packed and target_of(update) != update.p.path
    plain = LoraConfig()
    method: Any = LoraModel.out_projection_method_of(plain) if inside else LoraModel.method_of(plain)
    return float(method.times)


def _others(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Whole modules and tokens that are trained beside the method."""
    rows = _kind(adapter_config(model, name)) != "TRAINABLE_TOKENS"  # whose rows have become factors
    return {
        e.key: e.tensor.detach().clone()
        for e in walk(model, name)
        if isinstance(e.layer, AuxiliaryTrainingWrapper)
        or (rows and e.adapter and isinstance(e.adapter.method, TokenRows))
    }
