"""State dictionaries and adapter files: saving collects an adapter's tensors, loading fills them.

Both use the same pairs of a checkpoint key and a place in the model (`entries`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import PeftWarning, WrongKindError, check_adapters, listing, report
from ..kernels.modes import ordinary
from . import sharded
from .base_state import get_base_model_state_dict, set_base_model_state_dict
from .defaults import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .embeddings import embedding_tensors
from .entries import Entry, entries_of, mapped, plain, tensors_of, walk
from .experts import fused
from .files import INDEX_NAME, Saved, open_weights
from .fill import Found, checked, fill
from .hub import fetch
from .layer import tuner_layers
from .onload import brought
from .parts import joined, repeated, split, written
from .pour import Pouring, pour
from .renames import found_again, of_now

__all__ = [
    "adapter_config",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "walk",
]


class Foreseen(NamedTuple):
    """What a checkpoint would fill.

    `places` are the adapter's, `lacking` those without numbers (meta device) that it has no tensor for. `keys` has the
    place and the checkpoint's key by live name if every tensor goes as it is, with the keys that go nowhere. `fresh`:
    the adapter has just been made, for tensors that are read for it alone.
    """

    places: list[Entry]
    lacking: list[Entry]
    keys: dict[str, tuple[Entry, str]] | None = None
    unexpected: list[str] = []  # noqa: RUF012
    fresh: bool = False


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter under their checkpoint keys (without the adapter's name).

    Arguments:
        model: a PeftModel or a model with injected layers (keys then lack `base_model.model.`).
        state_dict: take the tensors from here, by live name (gathered from shards, for example).
        adapter_name: the adapter.
        unwrap_compiled: leave `torch.compile`'s `_orig_mod` out of the keys.
        save_embedding_layers: save the input and output embeddings too; "auto" does so where they are
            targeted or where the vocabulary has changed, decided from what was recorded when the model was
            wrapped.

    Raises ValueError if a tensor is missing from `state_dict`, or empty (a shard that was not gathered).
    """
    root, prefix = _unwrap(model)
    with nullcontext(False) if state_dict is not None else sharded.summoned(root) as opened:
        found = _own_state(root, prefix, state_dict, adapter_name, unwrap_compiled, save_embedding_layers)
        return {k: v.clone() for k, v in found.items()} if opened else found


def _own_state(
    root: nn.Module, prefix: str, state_dict: Any, adapter_name: str, unwrap_compiled: bool, save_embedding_layers: Any
) -> dict[str, Tensor]:
    config = adapter_config(root, adapter_name)
    entries = entries_of(root, config, adapter_name)
    entries += embedding_tensors(root, config, adapter_name, save_embedding_layers)
    tensors = _gathered(entries, state_dict) if state_dict is not None else tensors_of(entries)
    none = [(e, t) for e, t in zip(entries, tensors, strict=True) if 0 in t.shape]
    empty = [e.key for e, t in none if not sharded.shape(t).numel() and not _no_rank(e, t)]
    if empty:
        raise ValueError(
            f"Adapter {adapter_name!r} has tensors without elements: {listing(empty)}. They are probably shards: "
            "gather the full state on the saving process and pass it as `state_dict`."
        )
    keys = [plain(e.key) if unwrap_compiled else prefix + sharded.unwrapped(e.key) for e in entries]
    beside = _beside(root)  # which writes its own
    own: dict[str, Tensor] = {} if beside is None else beside.for_file(adapter_name, state_dict)
    for key, e, value in zip(keys, entries, tensors, strict=True):
        value = brought(e.owner, e.attr, value) if value.is_meta else value
        whole = value if type(value) is nn.Parameter and not value.__dict__ else sharded.full(value)
        own.update(split(e, key, whole.detach()))
        if e.adapter is None or e.adapter.method.copies:
            own.update(repeated(e, key, config))
    return own


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool | None = None,
    known: Foreseen | None = None,
) -> _IncompatibleKeys:
    """Write a checkpoint's tensors into an adapter, in place (an optimizer keeps its parameters).

    Arguments:
        model: a PeftModel or a model with injected layers.
        peft_model_state_dict: checkpoint key -> tensor, with or without the prefix `base_model.model.`; each
            tensor is cast to the dtype and moved to the device of its parameter.
        adapter_name: the adapter. Its settings stay; tensors do not tell theirs, which `load_adapter` compares.
        ignore_mismatched_sizes: leave tensors of another shape out, with a warning, instead of raising.
        low_cpu_mem_usage: the adapter was made on the meta device; tensors take the place of its parameters.
        strict: True turns missing and unexpected tensors into errors; None follows the process-wide setting.
        known: what `foreseen` has found for a checkpoint with these keys and shapes.

    Returns torch's (missing_keys, unexpected_keys); missing ones by live name.
    Raises RuntimeError for wrong shapes, ValueError if nothing fits, TypeError for what is no tensor; the model is
    then unchanged.
    """
    root = _unwrap(model)[0]
    if odd := {k: type(v).__name__ for k, v in peft_model_state_dict.items() if not isinstance(v, Tensor)}:
        raise WrongKindError(f"A checkpoint maps keys to tensors, but here are others: {odd}. Nothing was loaded.")
    with ordinary(), sharded.summoned(root, write=True):
        return _written(root, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, strict, known)


def _written(
    root: nn.Module,
    state: Mapping[str, Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool,
    strict: bool | None,
    known: Foreseen | None,
) -> _IncompatibleKeys:
    if known is not None and known.keys is not None:
        entries, write = known.places, None
        pairs = {live: (entry, state[key]) for live, (entry, key) in known.keys.items()}
        found = pairs, known.unexpected
    else:
        root, entries, state, write = _arranged(root, state, adapter_name, known and known.places)
        found = checked(root, entries, state, adapter_name, ignore_mismatched_sizes, write is not None)
    _tell_of_base(root, entries, found[0], adapter_name, strict)
    fresh, own = (False, False) if known is None else (known.fresh, known.fresh and known.keys is not None)
    missing, unexpected = fill(entries, *found, adapter_name, strict, fresh, own)
    written(entries)
    if write is not None:
        write()
    return _IncompatibleKeys([e.live for e in missing], unexpected)


def _tell_of_base(root: nn.Module, entries: list[Entry], found: Found, adapter_name: str, strict: bool | None) -> None:
    """Say that a file changes tensors of the base (embeddings saved beside it) on which other adapters run."""
    others = [name for name in getattr(root, "peft_config", ()) if name != adapter_name]
    own = {entry.live for entry in entries} if others else set()
    base = [pair for live, pair in found.items() if others and live not in own]
    changed = [e.key for e, v in base if not sharded.is_spread(e.tensor) and not _same(e.value(), v)]
    if changed:
        text = (
            f"The file of adapter {adapter_name!r} holds other numbers for {listing(changed)} of the base model, which "
            f"take the place of those that {listing(others)} were loaded on: these answer otherwise from now on. Load "
            "the adapter on a base of its own, or leave such tensors out of its file (save_embedding_layers=False)."
        )
        report(PeftWarning, text, strict, stacklevel=5)


def _same(here: Tensor, value: Tensor) -> bool:
    return here.shape == value.shape and torch.equal(here, value.to(here.device, here.dtype))


def foreseen(
    model: nn.Module, outline: Mapping[str, Tensor], adapter_name: str, ignore_mismatched_sizes: bool = False
) -> Foreseen:
    """What a checkpoint would fill, told by its keys and shapes.

    Arguments:
        model: a PeftModel or a model with injected layers.
        outline: checkpoint key -> tensor on the meta device.
        adapter_name: the adapter.
        ignore_mismatched_sizes: as for `set_peft_model_state_dict`.

    Raises what `set_peft_model_state_dict` raises of shapes and dtypes, without a warning.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root, entries, state, write = _arranged(model, outline, adapter_name)
        found, unexpected = checked(root, entries, state, adapter_name, ignore_mismatched_sizes, write is not None)
    lacking = [e for e in entries if e.live not in found and e.tensor.is_meta]
    if write is not None or ignore_mismatched_sizes or state.keys() != outline.keys():
        return Foreseen(entries, lacking)
    names = {id(value): key for key, value in outline.items()}
    keys = {live: (entry, names.get(id(value), "")) for live, (entry, value) in found.items()}
    return Foreseen(entries, lacking, keys if all(key for _, key in keys.values()) else None, unexpected)


def as_it_is(model: nn.Module, config: Any, outline: Mapping[str, Tensor]) -> bool:
    """Whether no rule of older names or of experts says that a checkpoint's keys mean others."""
    return of_now(config, fused(_unwrap(model)[0], outline)) is outline


def poured_into(model: nn.Module, adapter_name: str, pouring: Pouring, state: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's tensors, which nobody else has, into a new adapter as its molds say."""
    with ordinary(), sharded.summoned(_unwrap(model)[0], write=True):
        pour(adapter_name, pouring, state)


def _arranged(
    model: nn.Module, state: Mapping[str, Tensor], adapter_name: str, entries: list[Entry] | None = None
) -> tuple[nn.Module, list[Entry], Mapping[str, Tensor], Callable[[], None] | None]:
    """(the model, an adapter's places, the tensors for them, what writes the tensors that go beside the model)."""
    root = _unwrap(model)[0]
    config = adapter_config(root, adapter_name)
    entries = entries_of(root, config, adapter_name) if entries is None else entries
    _refuse_merged(root, adapter_name)
    state = of_now(config, fused(root, state))
    state = joined(entries, found_again(root, entries, state))
    beside = _beside(root)
    return root, entries, *((state, None) if beside is None else beside.take(state, adapter_name))


def load_peft_weights(
    model_id: str,
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Read an adapter's tensors from a folder or the hub: safetensors first, else the pickle's tensors.

    Arguments:
        model_id: folder or repository.
        device: where to put the tensors; None is the CPU (loading copies them to each parameter's own
            device).
        key_mapping: {regular expression: replacement} for keys, applied after the prefix; the first that
            fits wins.
        hf_hub_download_kwargs: `subfolder`, `revision`, `token`, `cache_dir` ...
    """
    return renamed(open_adapter(model_id, **hf_hub_download_kwargs).read(device), key_mapping)


def open_adapter(model_id: str, strict: bool | None = None, **download: Any) -> Saved:
    """The files of an adapter's tensors, of which the heads have been read; arguments as for `load_peft_weights`."""
    names = (SAFETENSORS_WEIGHTS_NAME, INDEX_NAME, WEIGHTS_NAME)
    return open_weights(fetch(model_id, names, **download), lambda name: fetch(model_id, name, **download), strict)


def renamed(state: dict[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The tensors under the names that `key_mapping` gives them; raises ValueError if two get the same name."""
    if not key_mapping:
        return state
    new: dict[str, Tensor] = {}
    for key, value in state.items():
        name = mapped(key, key_mapping)
        if name in new:
            raise ValueError(f"key_mapping gives {name!r} to several tensors, {key!r} the last of them. Make it exact.")
        new[name] = value
    return new


def adapter_config(model: nn.Module, adapter_name: str) -> Any:
    """The configuration of an adapter of the model; raises ValueError naming the adapters that exist."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise WrongKindError(
            f"{type(model).__name__} has no adapters. Expected a PeftModel or a model with injected layers."
        )
    check_adapters([adapter_name], configs)
    return configs[adapter_name]


def _refuse_merged(root: nn.Module, name: str) -> None:
    for path, layer in tuner_layers(root):
        if name in layer.merged_adapters:
            raise ValueError(f"Adapter {name!r} is merged in {path!r}. Unmerge it first, then load its weights.")


def _unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    inner = model._modules.get("_orig_mod")
    return (inner, "_orig_mod.") if inner is not None else (model, "")


def _beside(root: nn.Module) -> Any:
    """The prompts that stand beside a PeftModel, which FSDP1 may have been put around; None without any."""
    return sharded.inside(root).__dict__.get("prompts")


def _gathered(entries: list[Entry], state: Mapping[str, Tensor]) -> list[Tensor]:
    by_name = {plain(k): v for k, v in state.items()}
    missing = [e.live for e in entries if plain(e.live) not in by_name]
    if missing:
        raise ValueError(
            f"`state_dict` lacks {len(missing)} of the adapter's {len(entries)} tensors: {listing(missing)}. Pass the "
            "full state of the model (names as in `model.state_dict()`), or None to read the live tensors."
        )
    found = [by_name[plain(e.live)] for e in entries]
    wrong = [e.live for e, t in zip(entries, found, strict=True) if t.numel() and _misshapen(t, e)]
    if wrong:
        raise ValueError(
            f"`state_dict` holds {len(wrong)} of the adapter's tensors in another shape than the model's: "
            f"{listing(wrong)}. They may be shards, or another model's: pass the full state of this model."
        )
    return found


def _misshapen(given: Tensor, entry: Entry) -> bool:
    """Whether a tensor is surely none of an adapter's; what FSDP1 has spread is there as a flat part, or not at all."""
    held = {**entry.owner._buffers, **entry.owner._parameters}.get(entry.attr)
    if held is None:
        return False
    own = sharded.shape(held)
    return sharded.shape(given) != own and (len(own) > 1 or given.numel() < own.numel())


def _no_rank(entry: Entry, tensor: Tensor) -> bool:
    """Whether an empty tensor is what the adapter has: a matrix whose rank was cut to nothing; a buffer likewise."""
    if entry.tensor.numel():
        return False
    p = entry.adapter
    if p is None:  # shared by layers; only parameters are spread
        return entry.attr in entry.owner._buffers
    return tensor.dim() > 1 or entry.part in p.method.may_be_empty
