"""Which tensors belong to an adapter, and under which names: in the live model and in a file.

`walk` asks every layer what it has filed under an adapter's name; no name is taken apart, so no adapter or
module can be mistaken for another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .base_state import WRAPPERS, saved_tensors
from .layer import BaseTunerLayer, tuner_layers
from .onload import brought
from .stack import Adapter

PREFIX = "base_model.model."
Layers = list[tuple[str, Any]]  # path and layer, as `tuner_layers` tells them


class Entry(NamedTuple):
    """One tensor of an adapter: its key in a file, its name in the live model, and where it hangs.

    `adapter` is set for a tensor of a tuner layer, of whose path `part` is what follows in the key.
    """

    key: str
    live: str
    owner: nn.Module
    attr: str
    layer: nn.Module
    adapter: Adapter | None = None
    part: str = ""

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer as it is now."""
        found = self.owner._parameters.get(self.attr)
        return self.owner._buffers[self.attr] if found is None else found  # type: ignore[return-value]

    def value(self) -> Tensor:
        """The tensor, from where a hook keeps it."""
        held = self.tensor
        return brought(self.owner, self.attr, held) if held.is_meta else held


def tensors_of(entries: list[Entry]) -> list[Tensor]:
    """The tensor of each, as `Entry.tensor` has it."""
    found = [entry.owner._parameters.get(entry.attr) for entry in entries]
    return [entry.tensor if tensor is None else tensor for entry, tensor in zip(entries, found, strict=True)]


def walk(model: nn.Module, adapter_name: str, layers: Layers | None = None) -> list[Entry]:
    """Every tensor that the model's layers have filed under an adapter, in the order of the modules.

    Arguments:
        model: a PeftModel, a tuner, or a model with injected layers; keys are relative to it.
        adapter_name: the adapter.
        layers: the model's, where the caller has looked for them.
    """
    layers = list(tuner_layers(model)) if layers is None else layers
    seams, found, below = _seams(layers), list[Entry](), dict[str, str]()
    for path, layer in layers:
        start = _stated(below.get(path, path), seams) if seams or below else path
        if getattr(layer, "parameter_name", None) is not None:  # files know of the adapter's own layers in one place
            below[join(path, "base_layer")] = join(start, "base_layer") if adapter_name in layer.adapters else start
        p = layer.adapters.get(adapter_name) if isinstance(layer, BaseTunerLayer) else None
        for key, live, owner, attr in layer.slots(adapter_name):
            found.append(Entry(join(start, key), join(path, live), owner, attr, layer, p, key))
    return found


def entries_of(root: nn.Module, config: Any, adapter_name: str) -> list[Entry]:
    """All that an adapter trains: its own tensors, then the base model's biases that go with it."""
    layers = list(tuner_layers(root))
    found = [*walk(root, adapter_name, layers), *_biases(root, config, adapter_name)]
    return stated(root, config, found, layers)


def stated(root: nn.Module, config: Any, entries: list[Entry], layers: Layers | None = None) -> list[Entry]:
    """Entries under the keys that files have for them, whatever else the model holds.

    Wrappers that names leave out are left out, and the tuner too by adapters that need none (prompts).
    """
    seams = _seams(list(tuner_layers(root)) if layers is None else layers)
    around = hasattr(type(root._modules.get("base_model")), "inject_adapter")
    if around and getattr(config, "is_prompt_learning", False):
        seams = [(PREFIX, "base_model."), *seams]
    return [e._replace(key=_stated(e.key, seams)) for e in entries] if seams else entries


def _seams(layers: Layers) -> list[tuple[str, str]]:
    """(how names of modules start in the model, how in files) below each wrapper that names leave out."""
    found = [(path, layer._below[0]) for path, layer in layers if getattr(type(layer), "unnamed", False)]
    return [(f"{path}.{below}.", f"{path}.") for path, below in found]


def _stated(name: str, seams: list[tuple[str, str]]) -> str:
    for live, key in seams:
        if name.startswith(live):
            name = key + name[len(live) :]
    return name


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
        module, path = module.base_layer, join(path, "base_layer")
    if module._parameters.get("bias") is not None:
        name = join(path, "bias")
        yield Entry(name, name, module, "bias", layer)


def base_tensors(root: nn.Module) -> list[Entry]:
    """Every parameter and persistent buffer that belongs to no adapter, under its live name."""
    owned = _owned(root)
    hosts = (layer for _, layer in tuner_layers(root) if not layer._below)
    apart = {id(m) for host in hosts for m in host.modules()}  # nothing of the user's is below
    entries = []
    for path, module in root.named_modules():
        if id(module) in apart:
            continue
        for attr in saved_tensors(module):
            if (id(module), attr) not in owned:
                entries.append(Entry(join(path, attr), join(path, attr), module, attr, module))
    return entries


def _owned(root: nn.Module) -> set[tuple[int, str]]:
    layers = list(tuner_layers(root))
    names = {n for _, layer in layers for n in layer._get_available_adapters()}
    return {(id(s.owner), s.attr) for _, layer in layers for name in names for s in layer.slots(name)}


# Names ----------------------------------------------------------------------------------------------------


def join(path: str, name: str) -> str:
    """path.name, or the one of them that is not empty."""
    return f"{path}.{name}" if path and name else path or name


def plain(name: str) -> str:
    """A name without the segments that torch's wrappers (compile, FSDP, checkpointing) add."""
    if "_orig_mod" not in name and "_wrapped_module" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def spellings(key: str) -> tuple[str, str, str]:
    """How files may spell a key: as it is, below the tuner, and below the model itself."""
    return key, PREFIX + key, key.removeprefix(PREFIX)


def mapped(key: str, mapping: Mapping[str, str]) -> str:
    """A key renamed by the first regular expression that is found in it; the prefix stays out of that."""
    prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), "")
    rest = key[len(prefix) :]
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, rest)
        if count:
            return prefix + new
    return key
