"""Which embeddings are saved beside an adapter; decided without the network."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any, Literal, NamedTuple

from torch import nn

from ..errors import PeftWarning
from .base_state import model_below, saved_tensors
from .defaults import EMBEDDING_LAYER_NAMES
from .entries import Entry, stated
from .layer import AdapterHost, BaseTunerLayer
from .wrappers import ModulesToSaveWrapper


def embedding_tensors(root: nn.Module, config: Any, adapter_name: str, choice: bool | Literal["auto"]) -> list[Entry]:
    """The base tensors of the input and output embeddings that are saved with an adapter.

    Arguments:
        root: a PeftModel, or a model with injected layers.
        config: the adapter's configuration.
        adapter_name: the adapter.
        choice: True, False, or "auto" (embeddings that are targets, or all if the vocabulary has changed).
    """
    if choice is False:
        return []
    layers = _embeddings(root)
    targeted = _targeted(config, layers, adapter_name)
    if choice == "auto" and not _wanted(root, config, targeted):
        return []
    if not layers:
        text = f"{type(root).__name__} does not say which its embeddings are (`get_input_embeddings`); none is saved."
        warnings.warn(text, PeftWarning, stacklevel=4)
    picked = targeted or {p: m for p, m in layers.items() if not isinstance(m, ModulesToSaveWrapper)}
    found = [e for path, layer in picked.items() for e in _base_entries(path, layer)]
    return stated(root, config, found)


def _base_entries(path: str, layer: nn.Module) -> list[Entry]:
    """The tensors of the module at the bottom of (possibly) nested wrappers."""
    inner = layer
    while isinstance(inner, AdapterHost):
        path += f".{inner._below[0]}"
        inner = inner._modules[inner._below[0]]  # type: ignore[assignment]
    return [Entry(f"{path}.{n}", f"{path}.{n}", inner, n, layer) for n in saved_tensors(inner)]


def _wanted(root: nn.Module, config: Any, targeted: dict[str, nn.Module]) -> bool:
    rows = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None)
    if targeted and not rows:
        why = "they are targets of the adapter"
    elif _vocabulary_changed(root):
        why = "the vocabulary's size has changed"
    else:
        return False
    text = f"The embeddings are saved with the adapter because {why}; `save_embedding_layers=False` leaves them out."
    warnings.warn(text, PeftWarning, stacklevel=5)
    return True


def _embeddings(root: nn.Module) -> dict[str, nn.Module]:
    """The input and output embedding modules by path; none if the model does not name them."""
    base = model_below(root)
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(base, getter)())
        except (AttributeError, NotImplementedError):
            continue
    wanted = [id(m) for m in found if isinstance(m, nn.Module)]
    paths = {id(m): path for path, m in root.named_modules() if id(m) in wanted} if wanted else {}
    return {paths[id(m)]: m for m in found if id(m) in paths}


def _targeted(config: Any, layers: dict[str, nn.Module], adapter_name: str) -> dict[str, nn.Module]:
    """The embeddings that the adapter adapts, if its targets name them by their usual names."""
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) and not any(n in (targets or ()) for n in EMBEDDING_LAYER_NAMES):
        return {}
    return {
        path: m
        for path, m in layers.items()
        if isinstance(m, BaseTunerLayer)
        and adapter_name in m._get_available_adapters()
        and (not isinstance(targets, str) or path.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES)
    }


# The size of the vocabulary -------------------------------------------------------------------------------


def vocabulary(model: nn.Module) -> int | None:
    """The current size of the model's vocabulary by its configuration, or None if it has none."""
    return _vocab_of(getattr(model, "config", None))


class Sizes(NamedTuple):
    """How many words a model had when it was wrapped: by its configuration, and rows of its input embedding."""

    words: int | None
    rows: int | None


def recorded_vocabulary(model: nn.Module, name_or_path: str | None) -> Sizes:
    """The sizes to compare with when the model is saved; the base checkpoint's if it lies on this machine."""
    current = vocabulary(model)
    return Sizes(current if current is None else _on_disk(name_or_path) or current, _rows(model))


def _rows(model: nn.Module) -> int | None:
    try:
        found: Any = model.get_input_embeddings()  # type: ignore[operator]
        weight = getattr(found, "original_module", found).weight  # the wrapper's own would be computed
    except (AttributeError, NotImplementedError, TypeError):
        return None
    shape = tuple(getattr(weight, "ds_shape", getattr(weight, "shape", ())))
    return shape[0] if len(shape) == 2 else None


def _vocabulary_changed(root: nn.Module) -> bool:
    before = root.__dict__.get("_recorded_vocab")
    if before is None:
        return False
    now = Sizes(vocabulary(model_below(root)), _rows(model_below(root)))
    return any(None not in (a, b) and a != b for a, b in zip(now, before, strict=True))


def _vocab_of(config: Any) -> int | None:
    plain = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    size = plain.get("vocab_size")
    if size is None:
        text = plain.get("text_config")
        return _vocab_of(text) if text is not None else None
    return int(size)


def _on_disk(name_or_path: str | None) -> int | None:
    """The vocabulary in the checkpoint's config.json, looked up in its folder or the hub's local cache
    only.
    """
    if not name_or_path:
        return None
    path = os.path.join(name_or_path, "config.json")
    if not os.path.isdir(name_or_path):
        try:
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(name_or_path, "config.json")
        except (ImportError, ValueError):
            return None
    if not isinstance(path, str) or not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return _vocab_of(json.load(file))
    except (OSError, ValueError, TypeError):
        return None
