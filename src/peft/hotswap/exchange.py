"""Two loaded adapters of one form trading places, tensor by tensor, with nothing built, named or moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.buffers import BufferDict
from ..core.layer import BaseTunerLayer, tuner_layers
from ..core.stack import Adapter
from .change import copy_all


class Contents:
    """Everything that a model holds for one adapter, in the order of its layers.

    Arguments:
        model: the model.
        name: the adapter.
    """

    def __init__(self, model: Any, name: str):
        self.config = model.peft_config[name]
        self.tensors: list[Tensor] = []
        self.adapters: list[tuple[Adapter, tuple[str, ...]]] = []  # with the names of their plain values
        for _, layer in tuner_layers(model):
            self.tensors += [slot.tensor for slot in layer.slots(name)]
            if isinstance(layer, BaseTunerLayer) and name in layer.adapters:
                self._add(layer, layer.adapters[name])
        self.form = ([(t.shape, t.dtype) for t in self.tensors], [keys for _, keys in self.adapters])

    def _add(self, layer: BaseTunerLayer, p: Adapter) -> None:
        homes = (home for home in layer._modules.values() if isinstance(home, BufferDict))
        self.tensors += [home[p.name] for home in homes if home.unsaved(p.name)]
        scales = [k for k in layer._plain if isinstance(p.__dict__.get(k), Tensor)]
        self.tensors += [p.__dict__[k] for k in sorted(scales)]
        self.adapters.append((p, tuple(sorted(k for k in layer._plain if k in p.__dict__ and k not in scales))))

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


@torch.no_grad()
def exchange(one: Contents, two: Contents, aside: list[Tensor]) -> None:
    """Let two adapters of the same form trade tensors, plain values, settings and configuration.

    Arguments:
        one, two: their contents.
        aside: tensors of the same form that are overwritten on the way.
    """
    changed = []
    for (p, keys), (q, _) in zip(one.adapters, two.adapters, strict=True):
        mine, others = p.__dict__, q.__dict__
        differ = {k for k in keys if mine[k] is not others[k] and mine[k] != others[k]}
        for k in differ:
            mine[k], others[k] = others[k], mine[k]
        p.settings, q.settings = (  # a configuration itself stays where it is, and takes the other's values
            one.config if q.settings is two.config else q.settings,
            two.config if p.settings is one.config else p.settings,
        )
        changed += [p, q] if not differ <= p.method.free(p) else []
    copy_all(aside, one.tensors)
    copy_all(one.tensors, two.tensors)
    copy_all(two.tensors, aside)
    fields = dict(vars(one.config))
    vars(one.config).update(vars(two.config))
    vars(two.config).update(fields)
    for p in changed:
        p.layer._replan()
