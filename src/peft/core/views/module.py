"""A module of any class, as a whole: it may be no affine map, and nothing of it is read."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from .linear import Layer, LinearView, Pair


class ModuleView(LinearView):
    """A module of which only its call is known."""

    label = "Module"
    name = ""
    bias_name = ""
    activations = False
    dense = False

    def shape(self, m: Layer) -> Pair:
        return ()

    def bias(self, m: Layer) -> Tensor | None:
        return None

    def sample(self, m: Layer) -> Any:
        return next(itertools.chain(m.parameters(), m.buffers()), None)
