"""What seeds and base weights give is made late: first an adapter is held against the head of its file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .buffers import BufferDict
from .layer import BaseTunerLayer, tuner_layers
from .method import Method
from .shared import Shared, Sight, beside, shared_of

Spot = tuple[int, str]  # the identity of a holder, and the name of one of its tensors


class Once:
    """What an iterator gives, looked for when it is first gone through."""

    def __init__(self, items: Iterator[Sight]):
        self.items, self.seen = items, []  # type: tuple[Iterator[Sight], list[Sight]]

    def __iter__(self) -> Iterator[Sight]:
        self.seen.extend(self.items)
        yield from self.seen


class Waiting(NamedTuple):
    """What makes an adapter's shared tensors: method, settings, targets, and what is shared already."""

    method: Any
    settings: Any
    sights: Iterable[Sight]
    known: dict[str, Any]

    def made(self, sight: Callable[[Sight], Sight] | None = None) -> dict[str, Shared]:
        """The tensors; `sight` looks at targets in another way, where their weights are elsewhere."""
        sights = self.sights if sight is None else map(sight, self.sights)
        return self.method.shared_by(self.settings, sights)


def waiting(tuner: Any, name: str, wait: Waiting) -> dict[str, Shared]:
    """What the layers of a new adapter share, without numbers; it waits for `complete` if anything is to be made."""
    with torch.device("meta"):
        made = wait.made()
    if made or getattr(wait.method.drawn, "__func__", None) is not Method.drawn:
        tuner.waiting[name] = wait
    return made


@torch.no_grad()
def complete(tuner: Any, name: str, lacking: Collection[Spot] = (), sight: Any = None) -> None:
    """Make what adapter `name` lacks and no file brings, if a seed or the base weights give it.

    Arguments:
        tuner: the tuner.
        name: an adapter that was made while `late`; otherwise nothing is missing.
        lacking: tensors that files may hold, but this one does not.
        sight: as for `Waiting.made`.
    """
    wait: Waiting | None = tuner.waiting.pop(name, None)
    if wait is None:
        return
    homes = dict(shared_of(tuner))
    if any(_wanted(home, name, lacking) for home in homes.values()):
        with torch.random.fork_rng(devices=[]):  # first values that the file brings are drawn with the rest
            made = wait.made(sight)
        for key, new in made.items():
            if _wanted(homes[key], name, lacking):
                kind = homes[key].tensor(name).dtype
                _put(homes[key], name, beside({key: new}, homes[key].place, kind, wait.known)[key].tensor)
    for _, layer in tuner_layers(tuner.model):
        p = layer.adapters.get(name) if isinstance(layer, BaseTunerLayer) else None
        if p is not None:
            held = {k: h for k, h in layer._modules.items() if isinstance(h, BufferDict) and name in h}
            keys = [k for k, home in held.items() if _wanted(home, name, lacking)]
            drawn: Mapping[str, Tensor] = p.method.drawn(p, keys) if keys else {}
            place = layer.original_weight_device()
            for key, value in drawn.items():
                _put(held[key], name, value if place.type == "meta" else value.to(place))


def awaited(tuner: Any, name: str) -> int:
    """The bytes of what `complete` would make for an adapter that waits, as its configuration asks for them."""
    if name not in tuner.waiting:
        return 0
    layers = (layer for _, layer in tuner_layers(tuner.model) if isinstance(layer, BaseTunerLayer))
    held = (h for layer in layers for h in layer._modules.values() if isinstance(h, BufferDict) and name in h)
    homes: list[nn.Module] = [*dict(shared_of(tuner)).values(), *held]
    wanted = (home._buffers.get(name) for home in homes if _wanted(home, name, ()))
    return sum(int(t.nbytes) for t in wanted if t is not None)


def _wanted(home: nn.Module, name: str, lacking: Collection[Spot]) -> bool:
    held = home._buffers.get(name)
    saved = name not in home._non_persistent_buffers_set
    return held is not None and held.is_meta and (not saved or (id(home), name) in lacking)


def _put(home: nn.Module, name: str, value: Tensor) -> None:
    """Put numbers where there were none; whoever refers to the tensor has them too."""
    value = value.to(home._buffers[name].dtype).detach()  # type: ignore[union-attr]
    try:
        torch.utils.swap_tensors(home._buffers[name], value)
    except RuntimeError:  # something else holds the tensor
        home._buffers[name] = value
