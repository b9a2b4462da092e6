"""Merging a layer whose tensors are spread over processes: one layer at a time is made whole, and spread again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..merge import Mergeable
from .gather import full, whole


class Together(Mergeable):
    """A layer that merges, whatever spreads its tensors; the payload that unmerging gives back stays spread."""

    _modules: dict[str, nn.Module | None]

    def _opened(self, write: bool = False) -> AbstractContextManager[None]:
        base = self.get_base_layer()
        homes = [home for key, home in self._modules.items() if key != "base_layer" and home is not None]
        shared = {id(home): home for p in self.adapters.values() for home in p.shared.values()}
        modules = [base, *(m for home in homes for m in home.modules()), *shared.values()]
        return whole(modules, (self.view.name, self.view.bias_name) if write else ())

    @torch.no_grad()
    def tiles(self, names: tuple[str, ...]) -> Iterator[tuple[int, Tensor]]:
        """As `Mergeable.tiles`; every process computes all blocks."""
        with self._opened():
            yield from super().tiles(names)

    def _write(self, names: tuple[str, ...]) -> None:
        with self._opened(write=True):
            super()._write(names)

    def check_merge(self, names: tuple[str, ...]) -> None:
        """As `Mergeable.check_merge`."""
        with self._opened():
            super().check_merge(names)

    def _original(self, name: str) -> Tensor:
        return full(super()._original(name))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What adapter `adapter` adds to the whole weight, in the stored layout."""
        with self._opened():
            return full(super().get_delta_weight(adapter))
