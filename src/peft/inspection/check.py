"""Whether an adapter fits a base model: the heads of its files against the model without weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.base import build_model, unmade
from ..convert.names import Base
from ..convert.part import ConversionError
from ..core.checkpoint import open_adapter
from ..core.entries import Entry, base_tensors, entries_of, plain
from ..core.experts import fused
from ..core.files import in_hand
from ..core.fill import paired, same_kind
from ..core.fingerprint import difference, replaced_by
from ..core.parts import joined
from ..core.renames import found_again, of_now
from ..core.shared import late
from ..errors import nearest
from ..registry import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, load
from ..stream.shards import CheckpointError
from ..stream.skeleton import known
from .inspect import read_config
from .report import UnreadableAdapterError

NAME = "default"


@dataclass
class Fit:
    """An adapter beside a base model.

    Attributes:
        matched: how many tensors have their place in the model.
        missing: places without a tensor.
        unexpected: {tensor without a place: the nearest place, or ""}.
        misshapen: {tensor: (its shape, the shape in the model)}.
        refused: why the configuration cannot be put on the model at all, if so.
        base: how the model differs from the one that the adapter was saved from, if that was noted.
        notes: names that had to be translated, and the like.
    """

    adapter: str
    model: str
    matched: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: dict[str, str] = field(default_factory=dict)
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    refused: str = ""
    base: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all tensors have their place, all places their tensor, and the base is the same."""
        return not (self.refused or self.missing or self.unexpected or self.misshapen or self.base) and bool(
            self.matched
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "ok": self.ok}


def check_adapter(adapter: str | os.PathLike[str], base: Any, **download: Any) -> Fit:
    """Hold an adapter against a base model; no weight of either is read.

    Arguments:
        adapter: the folder, or a repository on the hub.
        base: the folder of the base model, or a model, best on the meta device: it gets the adapter's layers.
        download: `subfolder`, `revision` ... of the adapter's repository.

    Raises UnreadableAdapterError for an adapter that cannot be read, ConversionError for a base that cannot be made.
    """
    name = os.fspath(adapter)
    _, config, _ = read_config(name, **download)
    try:
        saved = open_adapter(name, **download)
    except (OSError, TypeError, ValueError) as error:
        raise UnreadableAdapterError(str(error)) from error
    outline = saved.outline
    model = base if isinstance(base, nn.Module) else _model(base, config, outline)
    fit = Fit(name, type(model).__name__)
    fit.base = difference(saved.metadata, model, replaced_by(config))
    with warnings.catch_warnings(record=True) as said, in_hand(list(outline)), late():
        warnings.simplefilter("always")
        try:
            _compare(_placed(model, config), config, outline, fit)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            fit.refused = str(error)
    fit.notes = list(dict.fromkeys(str(w.message) for w in said))
    return fit


def _placed(model: nn.Module, config: Any) -> nn.Module:
    """The model with the adapter on it, without numbers."""
    kind: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "") or load("peft.model:PeftModel")
    wrapped: nn.Module = kind(model, config, NAME, low_cpu_mem_usage=True)
    return wrapped


def _compare(root: nn.Module, config: Any, outline: Mapping[str, Tensor], fit: Fit) -> None:
    entries = entries_of(root, config, NAME)
    state = found_again(root, entries, of_now(config, fused(root, outline)))
    state, beside = joined(entries, state), root.__dict__.get("prompts")
    if beside is not None:
        count = len(state)
        state, _ = beside.take(state, NAME)
        fit.matched += count - len(state)
    found, left = paired(entries, state)
    own = {plain(e.key): e for e in base_tensors(root)} if left else {}
    for key in left:
        entry = own.get(plain(key))
        if entry is not None:
            found[entry.live] = (entry, state[key])
    known = [e.key for e in entries]
    fit.unexpected = {k: _near(k, known) for k in left if plain(k) not in own}
    fit.missing = [e.key for e in entries if e.live not in found]
    for entry, value in found.values():
        if _fits(entry, value):
            fit.matched += 1
        else:
            fit.misshapen[entry.key] = (tuple(value.shape), tuple(entry.tensor.shape))
    same_kind(found)


def _fits(entry: Entry, value: Tensor) -> bool:
    p = entry.adapter
    same = entry.tensor.shape == value.shape
    return same or (p is not None and p.method.takes(p, entry.part, tuple(value.shape)))


def _near(key: str, known: list[str]) -> str:
    hint = nearest(key, known) if len(known) <= 5000 else ""
    return hint.removeprefix(" Did you mean '").removesuffix("'?")


def _model(folder: Any, config: Any, outline: Mapping[str, Tensor]) -> nn.Module:
    """The base model of a folder on the meta device, of the class that the adapter's task or its record names."""
    base = Base(folder)
    stated = base.config()
    kind: Any = None
    if not stated.get("_class_name"):  # which diffusers writes
        try:
            kind, settings = known(base.path(""), stated, config)
        except CheckpointError as error:
            raise ConversionError(str(error)) from error
    if kind is None:
        return build_model(base, meta=True, name=(config.auto_mapping or {}).get("base_model_class"))
    labels = _labels(outline) if str(config.task_type).endswith("_CLS") else None
    if labels is not None:
        settings.num_labels = labels
    try:
        with torch.device("meta"):
            made: nn.Module = kind(settings)
    except (ImportError, OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise ConversionError(unmade(kind.__name__, folder, error)) from error
    return made


def _labels(outline: Mapping[str, Tensor]) -> int | None:
    """How many classes the adapter's own head has."""
    ends = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    return next((int(v.shape[0]) for k, v in outline.items() if k.endswith(ends)), None)
