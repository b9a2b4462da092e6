"""Which modules share the weight of the input embedding, told by the identity of parameter or storage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def innermost(module: Any) -> Any:
    """The module of the model itself, below tuner layers and wrappers of trained copies."""
    while True:
        inner = module._modules.get("base_layer")
        if inner is None:
            inner = module._modules.get("original_module")
        if inner is None:
            inner = module._modules.get("token_adapter")
        if inner is None:
            return module
        module = inner


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
