"""The names and shapes of a base model's modules: from a model, or from the headers of its files.

They prove what a flattened name means. A name that fits no module, or two, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ..core.header import read_header
from ..errors import listing, nearest
from .part import COMPONENTS, ConversionError

Shapes = dict[str, tuple[int, ...]]


def header(file: Path) -> tuple[Shapes, dict[str, str]]:
    """Shapes by key and metadata of a safetensors file, without reading a tensor."""
    try:
        head = read_header(file)
    except (OSError, ValueError) as error:
        raise ConversionError(str(error)) from error
    return {k: info.shape for k, info in head.tensors.items()}, head.metadata


class Base:
    """A base model: a folder (of one model, or of a pipeline with one folder for each), a model, or several.

    Arguments:
        source: the folder, the model, or {component: model}.
    """

    def __init__(self, source: Any):
        self.folder: Path | None = None
        self.models: dict[str, nn.Module] = {}
        if isinstance(source, nn.Module):
            self.models = {"": source}
        elif isinstance(source, dict):
            self.models = source
        else:
            self.folder = Path(source)
            if not self.folder.is_dir():
                raise ConversionError(f"base={str(source)!r} is no folder. Give the folder of the base model.")

    @cached_property
    def components(self) -> list[str]:
        """The models of a pipeline that are there; "" alone for a single model."""
        if self.folder is None:
            return list(self.models)
        found = [c for c in COMPONENTS if (self.folder / c).is_dir()]
        return found or [""]

    def place(self, component: str) -> str:
        """The component's own name, or "" where the base is a single model."""
        if component in self.components:
            return component
        if self.components == [""]:
            return ""
        raise ConversionError(
            f"The base has no component {component!r}, only {listing(self.components)}."
            f"{nearest(component, self.components)} Give `component`, or another base."
        )

    def path(self, component: str) -> Path:
        """The folder of one model."""
        if self.folder is None:
            raise ConversionError("The base is a model in memory, but its folder is needed. Give the path of the base.")
        return self.folder / self.place(component)

    def config(self, component: str = "") -> dict[str, Any]:
        """The content of `config.json`."""
        model = self.models.get(self.place(component))
        if model is not None:
            found: Any = getattr(model, "config", None) or {}
            return dict(found.to_dict() if hasattr(found, "to_dict") else found)
        file = self.path(component) / "config.json"
        if not file.is_file():
            raise ConversionError(f"{file} does not exist. Give the folder of the base model.")
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def modules(self, component: str) -> Shapes:
        """{name of a module with a weight of two axes or more: shape of the weight}."""
        model = self.models.get(self.place(component))
        if model is not None:
            weights = ((n, getattr(m, "weight", None)) for n, m in model.named_modules())
            return {n: tuple(w.shape) for n, w in weights if w is not None and w.dim() > 1}
        files = sorted(self.path(component).glob("*.safetensors"))
        if not files:
            raise ConversionError(
                f"{self.path(component)} holds no .safetensors files, by which the names of its modules are known. "
                "Save the base in safetensors, or give the model itself."
            )
        shapes = {k: s for file in files for k, s in header(file)[0].items()}
        return {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) > 1}


def flat(name: str) -> str:
    """A name as kohya's files have it, with underscores in place of dots."""
    return name.replace(".", "_")


def unflatten(
    wanted: dict[str, tuple[int, int]],
    modules: Shapes,
    wrappers: tuple[str, ...] = (),
    others: Mapping[str, str] | None = None,
    where: str = "",
) -> dict[str, str]:
    """{flattened name: name of the module}, each proven: one module only has that name and that shape.

    Arguments:
        wanted: {flattened name: (O, I) of its update; I is of all but the first axis of the weight}.
        modules: names and shapes of the base.
        wrappers: what files may have in front of all names although the base lacks it.
        others: {name in another code base: module}, for files that have such names.
        where: named in errors.

    Raises ConversionError with all names that fit nothing, or more than one module.
    """
    table: dict[str, list[str]] = {}
    for name, module in [*((m, m) for m in modules), *(others or {}).items()]:
        table.setdefault(flat(name), []).append(module)
    for wrapper in ("", *wrappers):
        cut = {name: name.removeprefix(wrapper) for name in wanted}
        found = {name: _fitting(table.get(cut[name], []), modules, wanted[name]) for name in wanted}
        if any(found.values()):
            break
    missing = [n for n, c in found.items() if not c]
    if missing:
        hint = nearest(cut[missing[0]], table)
        raise ConversionError(
            f"{len(missing)} names of the file fit no module of the base{where}: {listing(missing, 4)}.{hint} "
            "Give the base model that the adapter was trained for (names of other code bases than diffusers are known "
            "of UNets only)."
        )
    double = {n: c for n, c in found.items() if len(c) > 1}
    if double:
        name, several = next(iter(double.items()))
        raise ConversionError(
            f"{name!r} fits {len(several)} modules of the base{where}, {listing(several)}: which one is meant cannot "
            "be told from the file."
        )
    return {name: candidates[0] for name, candidates in found.items()}


def _fitting(candidates: list[str], modules: Shapes, size: tuple[int, int]) -> list[str]:
    """Of several candidates, those of the right shape."""
    return [m for m in candidates if fits(modules[m], size)] if len(candidates) > 1 else candidates


def fits(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether an update of (O, I) fits a weight, stored as (O, I...) or (I, O)."""
    O, *rest = shape
    wide = 1
    for n in rest:
        wide *= n
    return size == (O, wide) or (len(shape) == 2 and size == (shape[1], shape[0]))


def check_shapes(sizes: dict[str, tuple[int, int]], modules: Shapes, where: str = "") -> None:
    """Raise ConversionError for updates that do not fit the module they are meant for."""
    wrong = [
        f"{n} ({o} x {i}, the base has {modules[n]})" for n, (o, i) in sizes.items() if not fits(modules[n], (o, i))
    ]
    if wrong:
        raise ConversionError(f"Updates of another size than the base's weights{where}: {listing(wrong, 4)}.")


def overlapping(paths: Iterable[str], modules: Iterable[str]) -> bool:
    """Whether names, read as ends of names, select further modules."""
    wanted = set(paths)
    ends = tuple("." + p for p in wanted)
    return any(m not in wanted and m.endswith(ends) for m in modules)
