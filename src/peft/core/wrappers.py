"""Whole modules trained beside a method: one copy of the module per adapter, the original untouched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .batch import Unfused, is_mixed, join_parts, rows_of
from .buffers import tensors_below
from .call import Call
from .layer import AdapterHost, BaseTunerLayer
from .onload import own_copy
from .stack import Slot

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_BY_ROWS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AuxiliaryTrainingWrapper(AdapterHost):
    """What stands in place of a module that is trained beside a method."""

    unnamed: ClassVar[bool] = False  # names of modules below it, in configurations and files, leave it out

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain module to put back."""
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """{key in files: name in the live module} of an adapter, both relative to this wrapper."""
        return {slot.key: slot.live for slot in self.slots(adapter_name)}

    def slots(self, name: str) -> list[Slot]:
        """Every saved tensor of adapter `name`."""
        raise NotImplementedError


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """Holds `original_module` (frozen) and `modules_to_save`, a copy for each adapter; runs the active adapter's copy.

    Raises TypeError for containers, which have no forward, and for tuner layers.
    """

    _below: ClassVar[tuple[str, ...]] = ("original_module",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str, call: Call | None = None, path: str = ""):
        super().__init__()
        if isinstance(module_to_save, (*_CONTAINERS, BaseTunerLayer)):
            raise TypeError(
                f"modules_to_save selects {path!r}, a {type(module_to_save).__name__}, which cannot be copied as a "
                "whole. Name the modules inside it, or exclude it from target_modules if it is an adapted layer."
            )
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict({})
        self.__dict__.update(call=call or Call(), path=path, _active=(), _disabled=False, tied={})
        self.update(adapter_name)
        self.training = module_to_save.training

    def update(self, adapter_name: str, module: nn.Module | None = None) -> None:
        """Add a copy for an adapter; `module` instead of a copy of the original."""
        if adapter_name in self.modules_to_save:
            return
        new = own_copy(self.original_module) if module is None else module
        if module is None:
            new.requires_grad_(True)
        self.modules_to_save[adapter_name] = new

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, nn.Module]:
        """The copies by adapter name."""
        return self.modules_to_save._modules

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    def check_active(self, names: Sequence[str]) -> None:
        """Raise ValueError if several of these adapters have a copy here: only one can run."""
        mine = [n for n in names if n in self.adapters]
        if len(mine) > 1:
            raise ValueError(
                f"Only one adapter can be active for {self.path!r}, which is in modules_to_save, but {mine} all have a "
                "copy of it. Activate one of them."
            )

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Run and train the copy of one adapter; the original if none of the adapters has a copy here.

        Raises ValueError if several of them have.
        """
        self.activate((adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names), inference_mode)

    def activate(self, names: tuple[str, ...], inference_mode: bool = False) -> None:
        """Run the one of `names` that has a copy here, or the original if none has."""
        self.check_active(names)
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)
        self.__dict__["_active"] = tuple(n for n in names if n in self.adapters)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of an adapter's copy."""
        if name in self.adapters:
            yield from self.adapters[name].parameters()

    def holders(self) -> list[nn.Module]:
        """The copies, and the modules in them."""
        return [m for copy in self.adapters.values() for m in copy.modules()]

    def _set_disabled(self, disabled: bool) -> None:
        self.__dict__["_disabled"] = disabled

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Remove an adapter's copy; `new_active_adapters` are active afterwards."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        left = tuple(n for n in self._active if n in self.adapters)
        wanted = left if new_active_adapters is None else tuple(n for n in new_active_adapters if n in self.adapters)
        self.__dict__["_active"] = left
        if wanted != left:
            self.activate(wanted)

    def slots(self, name: str) -> list[Slot]:
        """Every saved tensor of adapter `name`; in files the wrapper leaves no trace."""
        if name not in self.adapters:
            return []
        return [
            Slot(leaf, f"modules_to_save.{name}.{leaf}", owner, attr)
            for owner, leaf, attr in tensors_below(self.adapters[name])
        ]

    # ---- forward -----------------------------------------------------------------------------------------------

    def _module(self) -> nn.Module:
        only = self.call.only
        if only is not None and not self._disabled:
            return self._of(only)
        return self._of(None if self._disabled or not self._active else self._active[0])

    def _of(self, name: str | None) -> nn.Module:
        """What the rows of an adapter run: its copy, or the original if it has none."""
        copy: nn.Module = self.adapters.get(name or "", self.original_module)
        return copy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.pop("adapter_names", None) or self.call.fact("names")
        if names is None or self._disabled or self.call.only is not None:
            return self._module()(*args, **kwargs)
        return self._mixed(tuple(names), args, kwargs)

    def _mixed(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        copies = {id(module): module for module in map(self._of, dict.fromkeys(names))}
        if len(copies) == 1:
            return next(iter(copies.values()))(*args, **kwargs)
        if not isinstance(self.original_module, _BY_ROWS):
            raise TypeError(
                f"adapter_names cannot be used with {self.path!r} in modules_to_save: a "
                f"{type(self.original_module).__name__} may mix the samples of a batch. Linear, embedding and "
                "convolution layers work."
            )
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        groups = self.call.groups(x.shape[0], x.device, self.path, names)
        parts = []
        for name, index in groups.items():
            take = rows_of(index, x.shape[0], 0)
            parts.append(self._of(name)(*map(take, args), **{k: take(v) for k, v in kwargs.items()}))
        return join_parts(parts, torch.cat(list(groups.values())).argsort(), 0)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The active adapter's copy, or the original if none is active, or is disabled without a merge."""
        names = [n for n in (adapter_names or self._active) if n in self.adapters]
        if self._disabled and not merge:
            return self.original_module
        if len(names) > 1:
            self.check_active(names)
        return self.adapters[names[0]] if names else self.original_module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "modules_to_save" not in self._modules or name.startswith("__"):
                raise
        found = getattr(self._module(), name)
        if name == "weight" and not self._disabled and isinstance(found, Tensor) and is_mixed(self.call):
            return Unfused.of(found, self.path)  # each sample has a copy of its own
        return found
