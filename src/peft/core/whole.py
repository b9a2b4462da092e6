"""Whole modules that an adapter trains: a copy in their place. Every step says how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from . import passing
from .host import below
from .targets import walk
from .tie import Place, aliases, inside
from .wrappers import ModulesToSaveWrapper


class Placing:
    """What puts modules in places of a model, for adapters of any kind.

    Attributes:
        tuner: what holds the adapters.
        model: the user's model, which may itself be replaced.
        name: the adapter's name.
        undo: receives what takes each step back.
        places: the modules that stand at several places.
    """

    tuner: Any
    model: nn.Module
    name: str
    undo: list[Callable[[], Any]]
    places: dict[int, list[Place]]

    def get(self, path: str) -> tuple[nn.Module | None, str, Any]:
        """(parent, name of the child, child) of a path; the parent of the model itself is None."""
        if not path:
            return None, "", self.model
        *above, leaf = path.split(".")
        parent = self.model
        for name in above:
            child = parent._modules.get(name)
            parent = parent.get_submodule(name) if child is None else child
        parent = inside(parent)
        return parent, leaf, parent._modules[leaf]

    def put(self, parent: nn.Module | None, leaf: str, module: nn.Module, instead_of: nn.Module) -> None:
        """Put a module in a place, and in every other that holds the same module; remember what stood there."""
        found = self.places.pop(id(instead_of), None)
        if found is not None:
            self.places[id(module)] = found

        def swap(new: nn.Module) -> None:
            if parent is None:
                self.model = self.tuner._modules["model"] = new
                return
            for owner, name in found or [(parent, leaf)]:
                owner._modules[name] = new

        self.undo.append(lambda: swap(instead_of))
        swap(module)

    def _freeze(self, modules: list[nn.Module] | None = None) -> None:
        """Freeze the base model, and have gradients pass through its quantised layers."""
        modules = below(self.model)[0] if modules is None else modules
        tables = [m._parameters for m in modules if m._parameters]
        trainable = [p for table in tables for p in table.values() if p is not None and p.requires_grad]

        def put(flag: bool) -> None:
            for p in trainable:
                p.requires_grad = flag  # requires_grad_ is not for weights that have no shape yet

        self.undo.append(lambda: put(True))
        put(False)
        if passing.let_through(modules):
            self.undo.append(lambda: passing.let_go(self.model))

    def _named(self) -> tuple[list[tuple[str, nn.Module]], dict[str, list[str]]]:
        """Path and module of the model as it is now; further paths of modules that stand at several places."""
        again: list[tuple[str, nn.Module]] = []
        modules = list(walk(self.model, again))
        return modules, aliases(modules, again)

    # ---- whole modules -----------------------------------------------------------------------------------------

    def whole_modules(self, entries: Sequence[str]) -> None:
        """Wrap the modules that `modules_to_save` selects: every module whose full name ends with an entry."""
        wrapped: list[str] = []
        modules, others = self._named() if entries else ([], {})
        for path, module in modules:
            selected = any(name.endswith(e) for name in (path, *others.get(path, ())) for e in entries)
            if path and selected and not any(path.startswith(f"{w}.") for w in wrapped):
                wrapped.append(path)
                self._wrap(path, module)

    def _wrap(self, path: str, module: nn.Module) -> ModulesToSaveWrapper:
        parent, leaf, _ = self.get(path)
        if isinstance(module, ModulesToSaveWrapper):
            module.update(self.name)
            wrapper = module
            self.undo.append(lambda: wrapper.delete_adapter(self.name))
        else:
            wrapper = ModulesToSaveWrapper(module, self.name, self.tuner.call, path)
            self.put(parent, leaf, wrapper, module)
        wrapper.set_requires_grad(self.name, False)
        return wrapper

    def _wrap_tied(self, path: str, source: str) -> None:
        """The tied module's copy holds the weight of the embedding's copy."""
        weight = self.get(source)[2].adapters[self.name].weight
        wrapper = self._wrap(path, self.get(path)[2])
        wrapper.adapters[self.name].weight = weight
