"""State dictionaries and adapter files: one walk over the tuner layers, for saving and for loading.

`walk` asks every layer what it has filed under an adapter's name. Saving collects the pairs (checkpoint key,
tensor), loading looks a file's keys up in the same pairs; no name is taken apart, so no adapter or module
can be mistaken for another. Loading plans everything first and changes nothing until the whole plan holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import MissingTensorsWarning, PeftWarning, UnexpectedTensorsWarning, listing, nearest, report
from .base_state import get_base_model_state_dict, saved_tensors, set_base_model_state_dict
from .defaults import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .embeddings import embedding_tensors
from .files import read_weights
from .hub import fetch
from .layer import AdapterHost, BaseTunerLayer, tuner_layers

__all__ = [
    "adapter_config",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "walk",
]

PREFIX = "base_model.model."
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class Entry(NamedTuple):
    """One tensor of an adapter: its key in a file, its name in the live model, and where it hangs."""

    key: str
    live: str
    owner: nn.Module
    attr: str
    layer: nn.Module

    @property
    def tensor(self) -> Tensor:
        found = self.owner._parameters.get(self.attr)
        return self.owner._buffers[self.attr] if found is None else found  # type: ignore[return-value]


def walk(model: nn.Module, adapter_name: str) -> list[Entry]:
    """Every tensor that the model's layers have filed under an adapter, in the order of the modules.

    Arguments:
        model: a PeftModel, a tuner, or a model with injected layers; keys are relative to it.
        adapter_name: the adapter.
    """
    return [
        Entry(_join(path, slot.key), _join(path, slot.live), slot.owner, slot.attr, layer)
        for path, layer in tuner_layers(model)
        for slot in layer.slots(adapter_name)
    ]


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
    config = adapter_config(root, adapter_name)
    entries = [*walk(root, adapter_name), *_biases(root, config, adapter_name)]
    entries += embedding_tensors(root, config, adapter_name, save_embedding_layers, Entry)
    tensors = _gathered(entries, state_dict) if state_dict is not None else [e.tensor for e in entries]
    empty = [e.key for e, t in zip(entries, tensors, strict=True) if not t.numel()]
    if empty:
        raise ValueError(
            f"Adapter {adapter_name!r} has tensors without elements: {listing(empty)}. They are probably "
            "shards: gather "
            "the full state on the saving process and pass it as `state_dict`."
        )
    keys = [_plain(e.key) if unwrap_compiled else prefix + e.key for e in entries]
    return {k: _whole(t.detach()) for k, t in zip(keys, tensors, strict=True)}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool | None = None,
) -> _IncompatibleKeys:
    """Write a checkpoint's tensors into an adapter, in place (an optimizer keeps its parameters).

    Arguments:
        model: a PeftModel or a model with injected layers.
        peft_model_state_dict: checkpoint key -> tensor, with or without the prefix `base_model.model.`; each
            tensor is cast to the dtype and moved to the device of its parameter.
        adapter_name: the adapter.
        ignore_mismatched_sizes: leave tensors of another shape out, with a warning, instead of raising.
        low_cpu_mem_usage: the adapter was made on the meta device; tensors take the place of its parameters.
        strict: True turns missing and unexpected tensors into errors; None follows the process-wide setting.

    Returns torch's (missing_keys, unexpected_keys); missing ones by live name.
    Raises RuntimeError for wrong shapes, ValueError if nothing fits; the model is then unchanged.
    """
    root, _ = _unwrap(model)
    config = adapter_config(root, adapter_name)
    entries = [*walk(root, adapter_name), *_biases(root, config, adapter_name)]
    _refuse_merged(root, adapter_name)
    found, unexpected = _match(root, entries, peft_model_state_dict)
    found = _same_shape(found, ignore_mismatched_sizes)
    missing = [e for e in entries if e.live not in found]
    if not found and (entries or peft_model_state_dict):
        raise ValueError(_nothing_fits(entries, list(peft_model_state_dict), adapter_name))
    if missing:
        report(MissingTensorsWarning, _missing_text(missing, unexpected, adapter_name, root), strict)
    if unexpected:
        report(UnexpectedTensorsWarning, _unexpected_text(unexpected, entries, adapter_name), strict)
    with torch.no_grad():
        ready = [(e, v if _assigned(e) else _fitted(v, e.tensor)) for e, v in found.values()]
        for entry, value in ready:
            _write(entry, value)
    return _IncompatibleKeys([e.live for e in missing], unexpected)


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
    file = fetch(model_id, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), **hf_hub_download_kwargs)
    state = read_weights(file, device)
    return {_mapped(k, key_mapping): v for k, v in state.items()} if key_mapping else state


def adapter_config(model: nn.Module, adapter_name: str) -> Any:
    """The configuration of an adapter of the model; raises ValueError naming the adapters that exist."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise ValueError(
            f"{type(model).__name__} has no adapters. Expected a PeftModel or a model with injected layers."
        )
    if adapter_name not in configs:
        raise ValueError(
            f"There is no adapter {adapter_name!r}.{nearest(adapter_name, configs)} "
            f"Existing adapters: {listing(configs) or 'none'}."
        )
    return configs[adapter_name]


# The parts of a state dictionary beside the adapter's own tensors ------------------------------------------


def _biases(root: nn.Module, config: Any, adapter_name: str) -> list[Entry]:
    """The base model's biases that `bias="all"` or `bias="<method>_only"` trains and saves."""
    bias = getattr(config, "bias", "none")
    if bias == "all":
        names = base_tensors(root)
        return [e for e in names if e.attr == "bias" and isinstance(e.tensor, nn.Parameter)]
    if not str(bias).endswith("_only"):
        return []
    return [e for path, layer in tuner_layers(root) for e in _layer_bias(path, layer, adapter_name)]


def _layer_bias(path: str, layer: nn.Module, adapter_name: str) -> Iterator[Entry]:
    if not isinstance(layer, BaseTunerLayer) or adapter_name not in layer._get_available_adapters():
        return
    module: nn.Module = layer
    while isinstance(module, BaseTunerLayer):
        module, path = module.base_layer, _join(path, "base_layer")
    if module._parameters.get("bias") is not None:
        name = _join(path, "bias")
        yield Entry(name, name, module, "bias", layer)


def base_tensors(root: nn.Module) -> list[Entry]:
    """Every parameter and persistent buffer that belongs to no adapter, under its live name."""
    owned = _owned(root)
    entries = []
    for path, module in root.named_modules():
        for attr in saved_tensors(module):
            if (id(module), attr) not in owned:
                entries.append(Entry(_join(path, attr), _join(path, attr), module, attr, module))
    return entries


def _owned(root: nn.Module) -> set[tuple[int, str]]:
    layers = list(tuner_layers(root))
    names = {n for _, layer in layers for n in layer._get_available_adapters()}
    return {(id(s.owner), s.attr) for _, layer in layers for name in names for s in layer.slots(name)}


# Looking a checkpoint's keys up ---------------------------------------------------------------------------

Found = dict[str, tuple[Entry, Tensor]]


def _match(root: nn.Module, entries: list[Entry], state: Mapping[str, Tensor]) -> tuple[Found, list[str]]:
    """Pair each checkpoint key with its place: the adapter's own first, then a tensor of the base by live
    name.
    """
    places = {_plain(e.key): e for e in entries}
    found: Found = {}
    left = [k for k, v in state.items() if not _take(places, found, k, v)]
    if not left:
        return found, []
    base = {_plain(e.key): e for e in base_tensors(root)}
    return found, [k for k in left if not _take(base, found, k, state[k])]


def _take(places: Mapping[str, Entry], found: Found, key: str, value: Tensor) -> bool:
    entry = next((places[k] for k in _spellings(key) if k in places), None)
    if entry is None or entry.live in found:
        return False
    found[entry.live] = (entry, value)
    return True


def _spellings(key: str) -> Iterator[str]:
    key = _plain(key)
    yield key
    yield PREFIX + key
    if key.startswith(PREFIX):
        yield key[len(PREFIX) :]


def _same_shape(found: Found, ignore: bool) -> Found:
    wrong = [n for n, (e, v) in found.items() if e.tensor.shape != v.shape]
    if not wrong:
        return found
    lines = [
        f"  {found[n][0].key}: {tuple(found[n][1].shape)} in the checkpoint, "
        f"{tuple(found[n][0].tensor.shape)} in the model"
        for n in wrong
    ]
    text = f"{len(wrong)} tensors of the checkpoint have another shape than the model's:\n" + "\n".join(lines)
    if not ignore:
        raise RuntimeError(
            f"size mismatch: {text}\nUse the rank and the base model of the checkpoint, or pass "
            "`ignore_mismatched_sizes=True` to leave these out."
        )
    report(PeftWarning, text + "\nThey are left out.", strict=False, stacklevel=4)
    return {n: pair for n, pair in found.items() if n not in set(wrong)}


def _nothing_fits(entries: list[Entry], keys: list[str], name: str) -> str:
    example = f", such as {keys[0]!r}.{nearest(keys[0], [e.key for e in entries[:500]])}" if keys else "."
    want = f"It expects keys such as {entries[0].key!r}." if entries else "It has no tensors."
    return (
        f"No tensor of the checkpoint fits adapter {name!r}; nothing was loaded. The checkpoint has "
        f"{len(keys)} "
        f"tensors{example} {want} Check the base model and the configuration, or rename keys with "
        "`key_mapping`."
    )


def _missing_text(missing: list[Entry], unexpected: list[str], name: str, root: nn.Module) -> str:
    lines = _hints([e.key for e in missing], unexpected)
    meta = any(e.tensor.device.type == "meta" for e in missing)
    tail = "They have no values (meta device)." if meta else "They keep the values they had."
    return (
        f"Found missing adapter keys while loading the checkpoint: it lacks {len(missing)} tensors of "
        f"adapter {name!r}:\n" + "\n".join(lines) + f"\n{tail}"
    )


def _unexpected_text(unexpected: list[str], entries: list[Entry], name: str) -> str:
    lines = _hints(unexpected, [e.key for e in entries])
    return f"{len(unexpected)} tensors of the checkpoint have no place in adapter {name!r}:\n" + "\n".join(lines)


def _hints(keys: list[str], choices: Iterable[str]) -> list[str]:
    pool = list(choices) if len(keys) <= 64 else []
    return [f"  {k}{nearest(k, pool)}" for k in keys]


# Writing tensors ------------------------------------------------------------------------------------------


def _refuse_merged(root: nn.Module, name: str) -> None:
    for path, layer in tuner_layers(root):
        if name in layer.merged_adapters:
            raise ValueError(f"Adapter {name!r} is merged in {path!r}. Unmerge it first, then load its weights.")


def _assigned(entry: Entry) -> bool:
    return entry.tensor.device.type == "meta"


def _write(entry: Entry, value: Tensor) -> None:
    """Copy in place; a meta parameter becomes the value, on its base layer's device, and stays the same
    object.
    """
    here = entry.tensor
    if not _assigned(entry):
        here.copy_(value)
        return
    new = value.detach().to(device=_home(entry), dtype=here.dtype, copy=True)
    new = nn.Parameter(new, requires_grad=here.requires_grad) if isinstance(here, nn.Parameter) else new
    try:
        torch.utils.swap_tensors(here, new)  # type: ignore[no-untyped-call]
    except RuntimeError:  # something else holds the tensor
        setattr(entry.owner, entry.attr, new)
        if isinstance(entry.layer, BaseTunerLayer):
            entry.layer._replan()


def _home(entry: Entry) -> torch.device:
    base = entry.layer
    while isinstance(base, AdapterHost):
        base = base._modules[base._below[0]]  # type: ignore[assignment]
    tensors = (t for t in (*base.parameters(), *base.buffers()) if t.device.type != "meta")
    first = next(tensors, None)
    return first.device if first is not None else torch.device("cpu")


def _fitted(value: Tensor, like: Tensor) -> Tensor:
    """The value as the parameter's kind of tensor: cast, moved, and sharded if the parameter is."""
    value = value.detach().to(dtype=like.dtype)
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), mesh, like.placements)  # type: ignore[attr-defined]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# Names ----------------------------------------------------------------------------------------------------


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _plain(name: str) -> str:
    """A name without the segments that torch's wrappers (compile, FSDP, checkpointing) add."""
    if "_orig_mod" not in name and "_wrapped_module" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    inner = model._modules.get("_orig_mod")
    return (inner, "_orig_mod.") if inner is not None else (model, "")


def _gathered(entries: list[Entry], state: Mapping[str, Tensor]) -> list[Tensor]:
    plain = {_plain(k): v for k, v in state.items()}
    missing = [e.live for e in entries if _plain(e.live) not in plain]
    if missing:
        raise ValueError(
            f"`state_dict` lacks {len(missing)} of the adapter's {len(entries)} tensors: {listing(missing)}. "
            "Pass the full "
            "state of the model (names as in `model.state_dict()`), or None to read the live tensors."
        )
    return [plain[_plain(e.live)] for e in entries]


def _mapped(key: str, mapping: Mapping[str, str]) -> str:
    prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), "")
    rest = key[len(prefix) :]
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, rest)
        if count:
            return prefix + new
    return key
