"""Merging a layer whose tensors are spread over processes: one layer at a time is made whole, and spread again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeftWarning
from ..merge import Mergeable
from ..method import Site
from ..stack import Adapter, Stack
from .gather import full, is_gathered, is_lent, is_mesh, is_spread, names, together, whole

UNSHARED = (
    "An adapter is added to a model that fully_shard has spread already, so it lies whole on each process, outside of "
    "fully_shard: its gradients are not averaged over the processes. To train it, add it before fully_shard is called."
)


class Together(Mergeable):
    """A layer that merges, whatever spreads its tensors; the payload that unmerging gives back stays spread."""

    _modules: dict[str, nn.Module | None]
    _compact = False  # nothing is spread, as a merge that is under way has found

    def _merge_here(self, names: tuple[str, ...], keep: bool) -> None:
        self.__dict__["_compact"] = not self._is_spread()
        try:
            super()._merge_here(names, keep)
        finally:
            self.__dict__.pop("_compact", None)

    def _is_spread(self, spread: Callable[[Tensor], bool] = is_spread) -> bool:
        return any(
            t is not None and spread(t)
            for m in (self.get_base_layer(), *self.holders())
            for d in (m._parameters, m._buffers)
            for t in d.values()
        )

    def holders(self) -> list[nn.Module]:
        """The modules that hold the tensors of its adapters."""
        shared = {id(home): home for p in self.adapters.values() for home in p.shared.values()}
        modules: list[nn.Module] = [*shared.values()]
        for p in self.adapters.values():
            if (tied := getattr(p.method, "share", None)) is not None:  # of another layer
                modules += tied.layer.holders()
        for key, home in self._modules.items():
            if key != "base_layer" and home is not None:
                modules += (
                    home.modules() if any(m._modules for m in home._modules.values() if m) else (home, *_of(home))
                )
        return modules

    def _opened(self, write: bool = False, mesh: bool = True) -> AbstractContextManager[None]:
        if self._compact or not self._is_spread():
            return nullcontext()
        return whole(
            (self.get_base_layer(), *self.holders()), (self.view.name, self.view.bias_name) if write else (), mesh
        )

    def readable(self) -> AbstractContextManager[None]:
        """Inside, what its adapters hold is whole, and may be written; the base weight lies as it lay."""
        if not together() or not self._is_spread(is_gathered):
            return nullcontext()
        modules = self.holders()
        return whole(modules, names(modules))

    def check_finite(self, names: tuple[str, ...]) -> None:
        """As `Mergeable.check_finite`."""
        with self._opened():
            super().check_finite(names)

    @torch.no_grad()
    def tiles(self, names: tuple[str, ...], into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """As `Mergeable.tiles`; every process computes all blocks."""
        with self._opened():
            yield from super().tiles(names, into)

    def _write(self, names: tuple[str, ...]) -> None:
        with self._opened(write=True):
            super()._write(names)

    def _payload(self) -> dict[str, Any]:
        with self._opened(mesh=False):  # a DTensor's payload is this process's part
            return super()._payload()

    def _restore(self) -> None:
        with self._opened(write=True, mesh=False):
            super()._restore()

    def check_merge(self, names: tuple[str, ...], stay: bool = True) -> None:
        """As `Mergeable.check_merge`."""
        with self._opened():
            super().check_merge(names, stay)

    def original_weight(self) -> Tensor:
        """The base weight without any merged adapter, (..., O, I), whole."""
        return full(super().original_weight())

    def original_bias(self) -> Tensor | None:
        """The base bias without any merged adapter, (O,), whole, or None."""
        return full(super().original_bias())

    def base_weight(self) -> Tensor:
        """The base weight as it is now, (..., O, I), whole."""
        return full(super().base_weight())

    def _original(self, name: str) -> Tensor:
        return full(super()._original(name))

    def stack(self, names: Sequence[str], extra: Any = None) -> Stack:
        """The base layer under the named adapters, in this order; names that the layer lacks are left out."""
        kind = Stack
        if is_mesh(self._weight()):  # what this imports, programs in one process do not need
            from .running import SpreadStack as kind
        return kind(self, tuple(self.adapters[n] for n in names if n in self.adapters), extra)

    # ---- a new adapter's tensors -------------------------------------------------------------------------------

    def _weight(self) -> Any:
        return self.get_base_layer()._parameters.get(self.view.name)

    def _in_sight(self) -> AbstractContextManager[None]:
        """Inside, first values may be made of the whole weight."""
        return self._opened() if is_spread(self._weight()) else nullcontext()

    def _noting(self, site: Site) -> Site:
        """The place of an adapter whose method's tensors are noted by what they count, if they will be spread."""
        if not self._splits():
            return site
        from .edge import Roles

        return replace(site, view=Roles(site.view))  # type: ignore[arg-type]

    def _spread(self, p: Adapter, site: Site) -> None:
        if self._splits():
            from .running import place

            place(p, site.view)  # type: ignore[arg-type]
        elif is_mesh(weight := self._weight()):
            from .running import agree

            agree(p, weight.device_mesh)
            if not getattr(site.settings, "inference_mode", False):
                warnings.warn(UNSHARED, PeftWarning, stacklevel=2)

    def _splits(self) -> bool:
        """Whether the weight is split while the layer runs, so that adapters are split like it."""
        return is_mesh(self._weight()) and not is_lent(self.get_base_layer(), self.view.name)

    def _beside(self, value: Tensor) -> Tensor:
        """A tensor derived later, where the adapter's others lie on a mesh."""
        weight = self._weight()
        if not self._splits() or is_mesh(value):
            return value
        from .running import replicate

        made = replicate(value.detach(), weight.device_mesh)
        return nn.Buffer(made) if isinstance(value, nn.Buffer) else made

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What adapter `adapter` adds to the whole weight, in the stored layout."""
        with self._opened():
            return full(super().get_delta_weight(adapter))


def _of(home: nn.Module) -> Iterator[nn.Module]:
    """The modules that a home of tensors holds."""
    return (m for m in home._modules.values() if m is not None)
