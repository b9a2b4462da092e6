"""The encoders of a model by adapter: what a layer is for the methods that change layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.host import AdapterHost
from ..core.stack import Slot

NO_WEIGHT = "Prompt learning adds tokens, or keys and values, and changes no weight: there is nothing to {}."


class Encoders(nn.ModuleDict, AdapterHost):
    """Loaded are those that are in it; the active ones make the prompt of a call, in the order of activation."""

    def _get_name(self) -> str:
        return nn.ModuleDict.__name__  # as models with prompts are printed

    def _get_available_adapters(self) -> set[str]:
        return set(self._modules)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """What training moves of an adapter."""
        encoder: Any = self._modules.get(name)
        return [] if encoder is None else encoder.trained()

    def named(self, name: str) -> dict[str, nn.Parameter]:
        """`adapter_parameters` by their names."""
        encoder: Any = self._modules.get(name)
        mine = {id(p) for p in self.adapter_parameters(name)}
        found = {} if encoder is None else dict(encoder.named_parameters())
        return {f"{name}.{n}": p for n, p in found.items() if id(p) in mine}

    def slots(self, name: str) -> list[Slot]:
        """None: files hold what an encoder makes."""
        return []

    def check_active(self, names: Sequence[str]) -> None:
        """Raise ValueError if these prompts cannot be active together."""
        mine: dict[str, Any] = {n: self._modules[n] for n in names if n in self._modules}
        cached = {n: (e.layers, e.heads, e.width, e.stride // 2) for n, e in mine.items() if e.caches}
        if len(set(cached.values())) > 1:
            raise ValueError(
                "Keys and values that stand in one cache must agree in (layers, heads, features, submodules), but "
                f"these are {cached}. Activate one of them."
            )

    def activate(self, names: tuple[str, ...], inference_mode: bool = False) -> None:
        """Make these active, and train them unless `inference_mode`; names of other methods are passed over."""
        for name in self._modules:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active = tuple(n for n in names if n in self._modules)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Forget an adapter."""
        self._modules.pop(adapter_name, None)
        self._active = tuple(n for n in self._active if n != adapter_name)

    def refuse_merge(self, names: Sequence[str]) -> None:
        """Raise NotImplementedError if one of these adapters is a prompt."""
        mine = [n for n in names if n in self._modules]
        if mine:
            raise NotImplementedError(
                f"{NO_WEIGHT.format('merge')} Leave {mine} out: give the others' names in adapter_names."
            )

    def _set_disabled(self, disabled: bool) -> None:
        self._disabled = disabled
