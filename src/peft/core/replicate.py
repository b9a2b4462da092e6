"""More layers from the same weights: the layer list of a model rebuilt from ranges of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_INNER = ("model", "bert", "transformer")  # what may stand around the part that holds the layers
_LISTS = ("layers", "encoder.layer", "h")
MOST = 16  # layers made of one: files come from others, and each layer is a tree of modules
OF_LAYERS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers")


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Rebuild the model's layer list as the concatenation of `ranges` of it, in place.

    Each new layer is a deep copy whose parameters are the very objects of its source, so the base costs no
    memory twice; adapters are added per copy. `layer_idx` and `config.num_hidden_layers` follow, and so do the lists
    of the configuration that have a value for each layer (`layer_types`).

    Arguments:
        model: a model whose layers are called `layers` (Llama), `encoder.layer` (BERT) or `h` (GPT-2).
        ranges: pairs [start, end), such as [[0, 16], [8, 24]]; without any, nothing happens.

    Returns a function that puts the old layers back.
    Raises ValueError if the model has no such list, or if a range is empty or not within it, or far too many are made.
    """
    if not ranges:
        return lambda: None
    owner, name = layer_list(model)
    layers: Any = owner._modules[name]
    order = order_of(ranges, len(layers))
    config: Any = getattr(model, "config", None)
    before = _settings(config, len(layers))
    fresh = [_share(layers[i]) for i in order]
    for index, layer in enumerate(fresh):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 - a plain value, not a parameter or module
    owner._modules[name] = type(layers)(fresh)
    for key, value in before.items():
        setattr(config, key, len(fresh) if isinstance(value, int) else [value[i] for i in order])

    def undo() -> None:
        owner._modules[name] = layers
        for key, value in before.items():
            setattr(config, key, value)

    return undo


def _settings(config: Any, count: int) -> dict[str, Any]:
    """What a configuration says of its `count` layers: their number, and lists with a value for each."""
    number = getattr(config, "num_hidden_layers", None)
    found: dict[str, Any] = {} if number is None else {"num_hidden_layers": number}
    for key in OF_LAYERS:
        value = getattr(config, "__dict__", {}).get(key)
        if isinstance(value, (list, tuple)) and len(value) == count:
            found[key] = value
    return found


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


def layer_list(model: Any) -> tuple[Any, str]:
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


def order_of(ranges: Sequence[Sequence[int]], count: int) -> list[int]:
    """The indices of the source layers, in the new order."""
    order: list[int] = []
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= count:
            raise ValueError(
                f"layer_replication has the range {list(pair)!r}; expected [start, end] with 0 <= start < end <= "
                f"{count}, the number of layers."
            )
        order += range(pair[0], pair[1])
        if len(order) > MOST * count:
            raise ValueError(
                f"layer_replication={ranges!s:.60} makes more than {MOST} layers of each of the model's {count}, which "
                "no adapter that is known does. Use fewer ranges."
            )
    return order


def _share(layer: nn.Module) -> nn.Module:
    """A deep copy of the layer with the same parameter objects."""
    return copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
