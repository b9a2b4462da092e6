"""One adapter file into another format: read, refuse or fold what the format cannot hold, write."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.commit import check_writable
from ..errors import listing, nearest
from .fold import fold
from .format import Format, Options, Report, Source
from .formats import FORMATS
from .names import Base
from .part import COMPONENTS, TENSORS, ConversionError, Feature, Part, features
from .sound import check

FOLDABLE = ("dora", "variant", "residual")
TARGETS = ("stacked", "embedding", "conv")
SILENT: Mapping[str, Mapping[str, Any]] = {  # fields without the features
    "lora_bias": {"lora_bias": False},
    "bias": {"bias": "none"},
    "modules_to_save": {"modules_to_save": None},
    "tokens": {"trainable_token_indices": None},
}


def convert_adapter(
    adapter: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    source: str | None = None,
    base: Any = None,
    component: str | None = None,
    rank: float | None = None,
    drop: bool = False,
    overwrite: bool = False,
) -> Report:
    """Write an adapter in another format. What the format cannot hold is an error that names it; nothing is written.

    Arguments:
        adapter: an adapter's folder, a folder with one for each model of a pipeline, or a file of kohya or diffusers.
        to: "lora" (a plain LoRA), "peft" (a folder of the same method), "kohya", "diffusers", "vllm",
            "sglang", "lorax" or "gguf".
        out: the folder to write, or a file for the formats of one file.
        source: the format of `adapter`; None tells it by the names of its tensors.
        base: the base model: its folder, the model itself, or {component: model}. Needed for updates that depend on its
            weights, for the names in kohya's files, and for GGUF.
        component: the model of a pipeline that a single adapter is for ("unet", "text_encoder" ...), or the one of
            several parts to convert.
        rank: where an update must be written as a LoRA and has no low rank of its own: the rank, or the share of the
            squared norm of each layer's update to keep, in (0, 1].
        drop: leave out what the format cannot hold, where the rest means the same without it, and name it in the
            report.
        overwrite: replace files that exist.

    Returns the report. Raises ConversionError.
    """
    target = format_named(to)
    read = Source(adapter)
    origin = format_named(source) if source is not None else detect(read)
    options = Options(Base(base) if base is not None else None, _component(component), rank, drop)
    report = Report(source=origin.name, target=target.name)
    _refuse_existing(Path(out), target, overwrite)
    parts = _chosen(origin.read(read, options), target, options)
    parts = {name: _fitting(part, name, target, options, report) for name, part in parts.items()}
    report.layers = sum(len(part.split()[0]) for part in parts.values())
    target.write(parts, Path(out), options, report)
    return report


def format_named(name: str) -> Format:
    """The format of that name; raises ConversionError with the names that there are."""
    if name not in FORMATS:
        raise ConversionError(f"{name!r} is no format.{nearest(name, FORMATS)} Use one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def detect(source: Source) -> Format:
    """The format of some files, by the names of their tensors."""
    found = [f for f in FORMATS.values() if f.recognises(source)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConversionError(
            f"{source.path} is of no format that can be read. Its tensors are {listing(source.keys, 3)}."
        )
    names = " and ".join(repr(f.name) for f in found)
    raise ConversionError(f"{source.path} looks like {names}. Give `source` (on the command line, --from).")


def _component(name: str | None) -> str | None:
    if name is not None and name not in COMPONENTS:
        raise ConversionError(f"component={name!r} is none.{nearest(name, COMPONENTS)} Use {', '.join(COMPONENTS)}.")
    return name


def _chosen(parts: dict[str, Part], target: Format, options: Options) -> dict[str, Part]:
    """The parts to convert: all, or that of the component."""
    wanted = options.component
    if wanted is not None and len(parts) > 1:
        if wanted not in parts:
            raise ConversionError(f"There is no part for {wanted!r}, only {listing(parts)}.")
        parts = {wanted: parts[wanted]}
    if target.whole_pipeline and "" in parts:
        raise ConversionError(
            f"Files of the format {target.name!r} say which model of a pipeline an adapter is for, and this one does "
            f"not tell. Give `component`: {', '.join(COMPONENTS)}."
        )
    return parts


def _fitting(part: Part, component: str, target: Format, options: Options, report: Report) -> Part:
    """The part with nothing in it that the format cannot hold."""
    for layer in part.split()[0] if part.method in TENSORS else ():
        check(layer.tensors, part.method, layer.path)
    beyond = _beyond(part, target)
    foldable = [f for f in beyond if _is_foldable(f, part)]
    if foldable:
        part = fold(part, component, foldable, options, report)
        beyond = _beyond(part, target)
    refused = [f for f in beyond if not (options.drop and f.removable)]
    if refused:
        raise ConversionError(_refusal(refused, target))
    for f in beyond:
        report.dropped.setdefault(f.text, []).extend(f.keys)
    part = part.without(k for f in beyond for k in f.keys)
    if not part.split()[0] and target.name != "peft":
        raise ConversionError("Nothing is left of the adapter without what the format cannot hold.")
    return _told(part, beyond)


def _beyond(part: Part, target: Format) -> list[Feature]:
    everything = target.holds if target.name != "peft" else target.holds | {part.method.lower()}
    return [f for f in features(part) if f.name not in everything]


def _is_foldable(feature: Feature, part: Part) -> bool:
    return feature.name in FOLDABLE or feature.name == part.method.lower()


def _refusal(refused: list[Feature], target: Format) -> str:
    lines = [f"{f.text}. {target.why(f.name)}".rstrip() for f in refused]
    text = f"The format {target.name!r} cannot hold " + "; nor ".join(lines)
    if all(f.removable for f in refused):
        return f"{text} To leave that out, give `drop` (--drop)."
    return text


def _told(part: Part, left: list[Feature]) -> Part:
    """The part with a configuration that no longer speaks of what was left out."""
    changes = {k: v for f in left for k, v in SILENT.get(f.name, {}).items()}
    if any(f.name in TARGETS for f in left):
        changes |= {"target_modules": sorted(x.path for x in part.split()[0]), "target_parameters": None}
        changes |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    if any(f.name == "modules_to_save" for f in left):
        part.noted = {}  # it is of the base without these modules
    if changes:
        part.config = copy.copy(part.config)
        for name, value in changes.items():
            setattr(part.config, name, value)
    return part


def _refuse_existing(out: Path, target: Format, overwrite: bool) -> None:
    place = target.place(out) if target.suffix else out
    check_writable(place)
    exists = place.is_file() or (place.is_dir() and any(place.iterdir()))
    if exists and not overwrite:
        raise ConversionError(f"{place} exists already. Give another `out`, or overwrite=True (--overwrite).")
