"""What is measured on a base model before an adapter is made: where, and where it is kept until then.

A measurement lies on the module that it belongs to, as an attribute, and in files under the module's path.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.commit import make_folders
from ...core.experts import rewrite
from ...core.targets import match, settings
from ...core.tie import innermost
from ...core.views import LinearView, view_of


class Spot(NamedTuple):
    """One weight that a configuration adapts."""

    path: str  # of the module that holds it
    module: nn.Module
    view: LinearView
    settings: Any  # the configuration with this path's patterns resolved
    reader: tuple[str, nn.Module] | None = None  # path and module of the parent, where that reads the weight

    @property
    def name(self) -> str:
        """Where the weight is: a path, for the module's own `weight`."""
        return self.path if self.view.name == "weight" else f"{self.path}.{self.view.name}".lstrip(".")

    @property
    def stage(self) -> str:
        """The path of the module whose calls show the weight's inputs."""
        return self.path if self.reader is None else self.reader[0]

    def vectors(self, args: Any, kwargs: Any) -> list[Tensor]:
        """What W is multiplied with in a call of the module at `stage`, as `LinearView.vectors` has it."""
        if self.reader is None:
            return self.view.vectors(self.module, args, kwargs)
        _, parent = self.reader
        return view_of(parent).child_vectors(parent, self.path.rpartition(".")[2], args, kwargs)

    def key(self, name: str) -> str:
        """The name of a measurement: the module's weight has the plain one."""
        return name if self.view.name == "weight" else f"{name}_{self.view.name}"

    def file_key(self, name: str) -> str:
        """The measurement's key in files."""
        return ".".join(part for part in (self.path, self.key(name)) if part)

    def get(self, name: str) -> Any:
        """The measurement, or None."""
        return self.module.__dict__.get(self.key(name))

    def set(self, name: str, value: Any) -> None:
        """Keep a measurement on the module, without making it a part of its state."""
        self.module.__dict__[self.key(name)] = value

    def drop(self, name: str) -> None:
        """Forget a measurement."""
        self.module.__dict__.pop(self.key(name), None)


def spots(model: nn.Module, config: Any) -> list[Spot]:
    """Every weight that the configuration adapts in a model, with or without adapters. Neither is changed."""
    config = copy.copy(config)
    undo = rewrite(config, model)
    try:
        return [spot for target in match(model, config).targets for spot in _of(target, config)]
    finally:
        undo()


def _of(target: Any, config: Any) -> Iterator[Spot]:
    """The weights of one target: its matrix or matrices, and the child layers whose weights it reads."""
    base = innermost(target.module)
    for name in [target.parameter] if target.parameter else view_of(base).parts(base) or [None]:
        view = view_of(base, name)
        yield Spot(target.path, base, view, settings(config, f"{target.path}.{name}" if name else target.path))
    for child in () if target.parameter else view_of(base).read_children:
        path = f"{target.path}.{child}" if target.path else child
        below = innermost(base.get_submodule(child))
        yield Spot(path, below, view_of(below), settings(config, path), (target.path, base))


def at(p: Any) -> Spot:
    """The place of an adapter."""
    return Spot(p.path, p.layer.get_base_layer(), p.layer.view, p.settings)


def has_inputs(spot: Spot) -> bool:
    """Whether the layer is called with the vectors that W is multiplied with, or with what they are cut out of."""
    view, m = spot.view, spot.module
    return spot.reader is None and view.activations and view.groups(m) == 1 and (view.dense or bool(view.kernel(m)))


@contextmanager
def hooked(modules: Mapping[Any, nn.Module], seen: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """While open, `seen(key, args, kwargs)` hears of every call of these modules."""
    handles = []
    for key, module in modules.items():

        def hook(_: nn.Module, args: Any, kwargs: Any, key: Any = key) -> None:
            seen(key, args, kwargs)

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read(file: str | None, what: str) -> dict[str, Any] | None:
    """A file of measurements; None if there is none.

    Raises ValueError if it holds something else.
    """
    if file is None or not os.path.exists(file):
        return None
    found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"{what}={file!r} is no dictionary of tensors. Delete it, or give another name.")
    return found


def write(file: str | None, values: Mapping[str, Any]) -> None:
    """Write measurements beside the old file, then put the new one in its place."""
    if file is None:
        return
    make_folders(os.path.dirname(os.path.abspath(file)))
    torch.save({k: v.contiguous().cpu() if isinstance(v, Tensor) else v for k, v in values.items()}, f"{file}.new")
    os.replace(f"{file}.new", file)
