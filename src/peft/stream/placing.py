"""Adapters on a skeleton: by the ordinary code of loading, so that what is refused there is refused here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.checkpoint import foreseen, open_adapter, renamed, set_peft_model_state_dict
from ..core.files import Saved, in_hand
from ..core.fingerprint import HASH, difference, fingerprint, replaced_by
from ..core.late import complete
from ..core.layer import BaseTunerLayer
from ..core.shared import late
from ..core.tokens import TokenRows
from ..core.tuner import BaseTuner
from ..core.wrappers import AuxiliaryTrainingWrapper
from ..errors import (
    MisfitError,
    NoMatchingPeftModuleError,
    OtherBaseWarning,
    PeftStrictError,
    PeftWarning,
    listing,
    report,
)
from ..persist import read_config
from ..registry import tuner_class
from ..types import plain
from .shards import CheckpointError


@dataclass
class Source:
    """An adapter's files: its configuration, its tensors, its name in the model and its weight."""

    place: str
    name: str
    weight: float
    config: Any
    saved: Saved


class Root(nn.Module):
    """What stands around a tuner, so that the keys of files are names below it."""

    def __init__(self, tuner: BaseTuner):
        super().__init__()
        self.base_model = tuner

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configurations by adapter name."""
        return self.base_model.peft_config

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return getattr(self.base_model.model, "config", None)


def read(adapters: Sequence[str | os.PathLike[str]], weights: Sequence[float]) -> list[Source]:
    """The adapters' files; raises CheckpointError for a method that changes no weights."""
    sources: list[Source] = []
    for place, weight in zip([os.fspath(a) for a in adapters], weights, strict=True):
        config, _ = read_config(place, False, {})
        method = plain(config.peft_type)
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise CheckpointError(
                f"The adapter in {place} is of the method {method}, which adds tokens, keys or values to the input and "
                "changes no weights. It cannot be merged: load it beside the base."
            )
        kind: Any = tuner_class(config.peft_type)  # type: ignore[arg-type]
        if why := kind.unmergeable:
            raise CheckpointError(f"The adapter in {place} is of the method {method}, which cannot be merged: {why}")
        sources.append(Source(place, _name(place, sources), weight, config, open_adapter(place)))
    return sources


def _name(place: str, others: Sequence[Source]) -> str:
    """The folder's name, as far as it can be the name of an adapter."""
    name = re.sub(r"\W", "_", os.path.basename(os.path.normpath(place))) or "adapter"
    taken = {s.name for s in others}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def place(model: nn.Module, sources: Sequence[Source], seen: Any) -> Any:
    """The tuner, with all adapters loaded and active in this order, each times its weight.

    Arguments:
        model: the skeleton.
        sources: the adapters.
        seen: has a target's weight read from the base, for what an adapter makes of all of them.

    Raises what loading raises: for missing, unexpected or misshapen tensors, for methods that do not mix.
    """
    tuner: Any = None
    with torch.random.fork_rng(devices=[]):
        for source in sources:
            renames = getattr(model, "_checkpoint_conversion_mapping", None) or None
            with in_hand(list(renamed(source.saved.outline, renames))), _of_this_base(model, source), late():
                tuner = _added(tuner, model, source)
            root = Root(tuner)
            with _of_this_base(model, source):
                foreseen(root, renamed(source.saved.outline, renames), source.name, False)
            state = renamed(source.saved.read(), renames)
            with _of_this_base(model, source):
                set_peft_model_state_dict(root, state, source.name, low_cpu_mem_usage=True, strict=True)
            complete(tuner, source.name, sight=seen)
            _check_base(root.base_model.model, source)
    tuner.eval()
    tuner.set_adapter([s.name for s in sources], inference_mode=True)
    for source in sources:
        if source.weight != 1:
            scale(tuner, source)
    return tuner


@contextmanager
def _of_this_base(model: nn.Module, source: Source) -> Iterator[None]:
    """Say which base an adapter was made for, if it does not fit this one."""
    try:
        yield
    except (NoMatchingPeftModuleError, MisfitError, PeftStrictError) as error:
        facts = getattr(error, "facts", str(error))
        raise CheckpointError(
            f"The adapter in {source.place} does not fit this base ({type(model).__name__}). {facts}\n"
            f"{_made_for(model, source)} Nothing was written."
        ) from error


def _made_for(model: nn.Module, source: Source) -> str:
    """What an adapter's files say of its base, and what to do."""
    config, noted = source.config, source.saved.metadata
    kind = (config.auto_mapping or {}).get("base_model_class")
    named = repr(config.base_model_name_or_path) if config.base_model_name_or_path else "a base that it does not name"
    mark = f" with the fingerprint {noted[HASH]}" if HASH in noted else ""
    text = f"It was made for {named}{f' ({kind})' if kind else ''}{mark}."
    replaced = replaced_by(config)
    if HASH in noted and type(model) is not nn.Module:
        if fingerprint(model, replaced)[HASH] == noted[HASH]:
            return (
                f"{text} This base has that fingerprint, so it is the files of the adapter that do not belong "
                "together: adapter_config.json or the weights have been changed since. Restore or save them again."
            )
        lines = difference(noted, model, replaced)
        text += f" This base differs from it: {'; '.join(lines[:8])}." if lines else ""
    return f"{text} Give that base, or an adapter that was made for this one."


def _check_base(model: nn.Module, source: Source) -> None:
    """Warn if the adapter notes another base; a base whose class had to be guessed has no shapes to compare."""
    if type(model) is nn.Module:
        return
    lines = difference(source.saved.metadata, model, getattr(source.config, "modules_to_save", None) or ())
    if lines:
        text = (
            f"The adapter in {source.place} was saved from another base, though its tensors fit: {'; '.join(lines[:8])}"
        )
        report(OtherBaseWarning, text, strict=None, stacklevel=5)


def _added(tuner: Any, model: nn.Module, source: Source) -> Any:
    kind: Any = tuner_class(source.config.peft_type)
    if tuner is None:
        return kind(
            model, {source.name: source.config}, source.name, low_cpu_mem_usage=True, autocast_adapter_dtype=True
        )
    if not isinstance(tuner, kind) and (kind.alone or type(tuner).alone):
        only = kind if kind.alone else type(tuner)
        raise CheckpointError(
            f"{only.__name__} takes adapters of its own method only, but {source.place} is of another than the first "
            "adapter. Merge one, then the other into the result."
        )
    tuner.peft_config[source.name] = source.config
    tuner.inject_adapter(tuner.model, source.name, low_cpu_mem_usage=True)
    return tuner


# Weights ----------------------------------------------------------------------------------------------------


def scale(tuner: Any, source: Source) -> None:
    """Multiply what an adapter adds to weights: its scaling, or tensors in which the new weight is affine.

    Raises CheckpointError for a method that has neither.
    """
    whole = []
    for path, layer in tuner.layers():
        if isinstance(layer, BaseTunerLayer) and source.name in layer.adapters:
            if not layer.view.name or isinstance(layer.adapters[source.name].method, TokenRows):
                whole.append(path)
            elif not _scaled(layer, source.name, source.weight):
                method = type(layer.adapters[source.name].method).__name__
                raise CheckpointError(
                    f"--weight {source.weight}: the adapter in {source.place} has no scaling at {path!r} ({method}), "
                    "so it is merged whole or not at all. Use the weight 1."
                )
        elif isinstance(layer, AuxiliaryTrainingWrapper) and source.name in layer._get_available_adapters():
            whole.append(path)
    if whole:
        text = (
            f"The weight {source.weight} of {source.place} counts for its updates; {listing(whole)}, which it trained "
            "as a whole, are taken as they are."
        )
        report(PeftWarning, text, strict=False, stacklevel=4)


@torch.no_grad()
def _scaled(layer: Any, name: str, weight: float) -> bool:
    p = layer.adapters[name]
    if "scaling" in p.__dict__:
        layer.set_scale(name, weight) if hasattr(layer, "set_scale") else setattr(p, "scaling", p.scaling * weight)
        return True
    linear: Mapping[str, float] = p.method.linear
    if not linear:
        return False
    for slot in layer.slots(name):
        start = next((v for k, v in linear.items() if slot.key == k or slot.key.startswith(f"{k}.")), None)
        if start is not None:
            slot.tensor.copy_(start + weight * (slot.tensor - start))
    return True
