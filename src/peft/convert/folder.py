"""Folders as `save_pretrained` writes them: of any method (`peft`), or of a plain LoRA (`lora`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import PeftConfig
from ..core.checkpoint import open_adapter
from ..core.defaults import CONFIG_NAME
from ..core.digests import NUMBERS
from ..core.entries import PREFIX
from ..core.files import CONFIG_HASH, config_hash, staged, write_weights
from ..core.fingerprint import HASH, SHAPES
from ..errors import UnknownFieldWarning
from .format import Format, Options, Report, Source
from .part import ConversionError, Part, bare

ALL = frozenset(
    [
        *("loha", "lokr", "alora", "variant", "residual", "replication", "stacked", "embedding", "conv", "dora"),
        *("lora_bias", "bias", "tokens", "training", "modules_to_save", "weights"),
    ]
)


class PeftFolder(Format):
    """A PEFT folder of whatever method the adapter has."""

    name = "peft"
    text = "folder of save_pretrained, of the method that the adapter has"
    holds = ALL

    def recognises(self, source: Source) -> bool:
        return bool(source.parts)

    def read(self, source: Source, options: Options) -> dict[str, Part]:
        parts = {}
        for component, folder in source.parts.items():
            config = _config(folder)
            name = component or options.component or component_of(config)
            try:
                saved = open_adapter(str(folder))
                state = bare(saved.read())
            except (OSError, ValueError) as error:
                raise ConversionError(str(error)) from error
            parts[name] = Part(config, state, {k: v for k, v in saved.metadata.items() if k in (HASH, SHAPES, NUMBERS)})
        if not parts:
            raise ConversionError(f"{source.path} holds no adapter_config.json, so it is no PEFT folder.")
        return parts

    def write(self, parts: Mapping[str, Part], out: Path, options: Options, report: Report) -> None:
        if out.suffix in (".safetensors", ".bin", ".gguf"):
            raise ConversionError(f"out={str(out)!r} names a file, but the format {self.name!r} is a folder.")
        for component, part in parts.items():
            write_folder(part, out / component if len(parts) > 1 else out, report)


class PlainLora(PeftFolder):
    """A PEFT folder that holds an ordinary LoRA."""

    name = "lora"
    text = "folder of a plain LoRA, whatever the method was"
    holds = ALL - {"loha", "lokr", "alora", "variant", "residual", "dora", "training"}

    def recognises(self, source: Source) -> bool:
        return False


def write_folder(part: Part, folder: Path, report: Report) -> None:
    """Write both files of a PEFT folder, or neither."""
    with staged(folder) as stage:
        part.config.save_pretrained(stage)
        noted = {**part.noted, CONFIG_HASH: config_hash(part.config.from_json_file(stage / CONFIG_NAME))}
        write_weights({PREFIX + k: v for k, v in part.state.items()}, stage, metadata=noted)
        names = sorted(p.name for p in stage.iterdir() if p.is_file())
    report.files += [folder / name for name in names]


def _config(folder: Path) -> Any:
    """The configuration; fields that are not known may change the result, so they are not ignored here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UnknownFieldWarning, message="Unexpected keyword")
        try:
            return PeftConfig.from_pretrained(str(folder))
        except UnknownFieldWarning as problem:
            raise ConversionError(f"{problem} A conversion cannot know what they mean: take them out first.") from None
        except (TypeError, ValueError) as problem:
            raise ConversionError(f"{folder} has no usable configuration: {problem}") from problem


def component_of(config: Any) -> str:
    """The component that a model's class tells; "" if it tells none."""
    name = str((config.auto_mapping or {}).get("base_model_class", ""))
    if name.startswith("UNet"):
        return "unet"
    if name.endswith(("Transformer2DModel", "Transformer3DModel")):
        return "transformer"
    return "text_encoder" if name == "CLIPTextModel" else ""
