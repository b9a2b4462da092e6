"""More layers from the same weights: the layer list of a model rebuilt from ranges of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_INNER = ("model", "bert", "transformer")  # what may stand around the part that holds the layers
_LISTS = ("layers", "encoder.layer", "h")


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Rebuild the model's layer list as the concatenation of `ranges` of it, in place.

    Each new layer is a deep copy whose parameters are the very objects of its source, so the base costs no
    memory twice; adapters are added per copy. `layer_idx` and `config.num_hidden_layers` follow.

    Arguments:
        model: a model whose layers are called `layers` (Llama), `encoder.layer` (BERT) or `h` (GPT-2).
        ranges: pairs [start, end), such as [[0, 16], [8, 24]]; without any, nothing happens.

    Returns a function that puts the old layers back.
    Raises ValueError if the model has no such list, or if a range is empty or not within it.
    """
    if not ranges:
        return lambda: None
    owner, name = _layer_list(model)
    layers: Any = owner._modules[name]
    order = _order(ranges, len(layers))
    config: Any = getattr(model, "config", None)
    before = getattr(config, "num_hidden_layers", None)
    fresh = [_share(layers[i]) for i in order]
    for index, layer in enumerate(fresh):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 - a plain value, not a parameter or module
    owner._modules[name] = type(layers)(fresh)
    if before is not None:
        config.num_hidden_layers = len(fresh)

    def undo() -> None:
        owner._modules[name] = layers
        if before is not None:
            config.num_hidden_layers = before

    return undo


def check_repeated(ranges: Sequence[Sequence[int]], others: Sequence[Any]) -> None:
    """Raise ValueError unless one of the configurations in `others`, whose adapters stand in the layers, has the same.

    Arguments:
        ranges: the `layer_replication` of a further adapter.
        others: the configurations of the model's other adapters.
    """
    known = [found for c in others if (found := getattr(c, "layer_replication", None))]
    if any([list(pair) for pair in found] == [list(pair) for pair in ranges] for found in known):
        return
    state = f"was rebuilt with {known[0]!r}" if known else "is not replicated"
    raise ValueError(
        f"layer_replication={ranges!r} rebuilds the list of layers, but adapters stand in it already, and it {state}. "
        "Make a PeftModel of its own for this adapter, with a fresh base model."
    )


def _layer_list(model: Any) -> tuple[Any, str]:
    """The module that holds the layer list, and the list's name there."""
    from torch import nn

    inner = model
    for name in _INNER:
        while isinstance(getattr(inner, name, None), nn.Module):
            inner = getattr(inner, name)
    for path in _LISTS:
        parent, _, name = path.rpartition(".")
        owner = getattr(inner, parent, None) if parent else inner
        if owner is not None and isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name
    raise ValueError(
        f"layer_replication needs a list of layers, but {type(model).__name__} has none at "
        f"{', '.join(repr(p) for p in _LISTS)} (below 'model', 'bert' or 'transformer'). Leave layer_replication out, "
        "or build the deeper model yourself."
    )


def _order(ranges: Sequence[Sequence[int]], count: int) -> list[int]:
    """The indices of the source layers, in the new order."""
    order: list[int] = []
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= count:
            raise ValueError(
                f"layer_replication has the range {list(pair)!r}; expected [start, end] with 0 <= start < end <= "
                f"{count}, the number of layers."
            )
        order += range(pair[0], pair[1])
    return order


def _share(layer: nn.Module) -> nn.Module:
    """A deep copy of the layer with the same parameter objects."""
    return copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
