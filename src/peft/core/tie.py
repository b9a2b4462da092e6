"""What stands or is held at several places: modules, and the weight of the input embedding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import storage
from .host import AdapterHost, below

if TYPE_CHECKING:
    from torch import Tensor, nn

Place = tuple["nn.Module", str]


def places(model: nn.Module, walked: tuple[list[nn.Module], bool] | None = None) -> dict[int, list[Place]]:
    """The modules that stand at several places: id -> (parent, name of the child) of each place.

    Like every walk, it does not enter the modules of adapters. `walked` is what `below` says of the model, where known.
    """
    if not (below(model) if walked is None else walked)[1]:
        return {}
    found: dict[int, list[Place]] = {}
    stack, seen = [model], {id(model)}
    while stack:
        parent = stack.pop()
        for name in parent._below if isinstance(parent, AdapterHost) else parent._modules:
            child = parent._modules[name]
            if child is None:
                continue
            found.setdefault(id(child), []).append((parent, name))
            if id(child) not in seen:
                seen.add(id(child))
                stack.append(child)
    return {key: where for key, where in found.items() if len(where) > 1}


def aliases(modules: list[tuple[str, nn.Module]], again: list[tuple[str, nn.Module]]) -> dict[str, list[str]]:
    """Further paths of modules that stand at several places: path of the first place -> the other paths.

    Arguments:
        modules: path and module of a walk, each module once.
        again: path and module of every place where that walk met a module another time, in its order.
    """
    first = {id(module): path for path, module in modules} if again else {}
    known = [(path, path) for path, _ in modules] if again else []  # a name, and the walk's name of the same module
    for path, module in again:
        start = first[id(module)]
        below = [(name, home) for name, home in known if name == start or name.startswith(f"{start}.")]
        known += [(path + name[len(start) :], home) for name, home in below]
    found: dict[str, list[str]] = {}
    for name, home in known[len(modules) :]:
        found.setdefault(home, []).append(name)
    return found


def inside(module: Any) -> Any:
    """The module itself, or the one below a wrapper that names leave out."""
    while getattr(type(module), "unnamed", False):
        module = module._modules[module._below[0]]
    return module


def plain_path(root: Any, path: str) -> str:
    """The name that the module at `path` has without adapters, which put a "base_layer" into it where they stand."""
    found, at = [], root
    for part in path.split("."):
        if part != "base_layer" or at is None or not _is_around(at):
            found.append(part)
        at = None if at is None else at._modules.get(part)
    return ".".join(found)


def _is_around(module: Any) -> bool:
    """Whether a module stands around one of the model's own, which may use the names that such modules have inside."""
    kind = type(module)
    return hasattr(kind, "adapter_layer_names") or hasattr(kind, "unload_and_optionally_merge_module")


def innermost(module: Any) -> Any:
    """The module of the model itself, below tuner layers and wrappers of trained copies."""
    while (below := module._modules) and _is_around(module):
        inner = below.get("base_layer")
        if inner is None:
            inner = below.get("original_module")
        if inner is None:
            inner = below.get("token_adapter")
        if inner is None:
            break
        module = inner
    return module


def among(parent: Any, leaf: str, found: Any, parameter: str) -> tuple[Any, str, Any]:
    """Where the layer of a parameter belongs among those of its module's others: the first one lies innermost.

    Arguments:
        parent, leaf, found: the place of the outermost, and what stands there.
        parameter: the name.

    Returns the same three.
    """
    order = [name for name, _ in storage.parameters(innermost(found))]
    later = order[order.index(parameter) :] if parameter in order else ()
    while getattr(found, "parameter_name", None) in later and _is_around(found):
        parent, leaf, found = found, "base_layer", found._modules["base_layer"]
    return parent, leaf, found


def input_embedding(model: Any, modules: Iterable[tuple[str, nn.Module]]) -> tuple[str, nn.Module] | None:
    """Path and module of the input embedding: what the model says, else what is called `embed_tokens`."""
    told = None
    if hasattr(model, "get_input_embeddings"):
        try:
            told = model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            told = None
    for path, module in modules:
        if module is told if told is not None else path.rpartition(".")[2] == "embed_tokens":
            return path, module
    return None


def tied_modules(embedding: tuple[str, nn.Module], modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Paths of the other modules whose `weight` is the embedding's."""
    weight = getattr(innermost(embedding[1]), "weight", None)
    if weight is None:
        return []
    key = storage_key(weight)
    found = []
    for path, module in modules:
        if path == embedding[0]:
            continue
        other = innermost(module)._parameters.get("weight")
        if other is not None and (other is weight or (other.shape == weight.shape and storage_key(other) == key)):
            found.append(path)
    return found


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors if they start at the same memory; one without memory has a key of its own."""
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        pointer = 0
    return (tensor.device, pointer, tensor.storage_offset()) if pointer else (id(tensor),)
