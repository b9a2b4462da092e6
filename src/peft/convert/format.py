"""What a file format of adapters states: the features it can hold, how it is recognised, read and written.

A format is one file here and one line in `formats.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.defaults import CONFIG_NAME
from ..core.files import read_weights, staged
from ..errors import listing
from .part import COMPONENTS, ConversionError, Part

if TYPE_CHECKING:
    from .names import Base


@dataclass
class Report:
    """What a conversion has done.

    Attributes:
        source: the format that was read.
        target: the format that was written.
        files: the files that were written.
        layers: how many targets the adapter has.
        folded: what was expressed in another way, such as scalings that went into B.
        dropped: what was left out because the user said so, by feature.
        notes: what the user of the result has to know.
    """

    source: str = ""
    target: str = ""
    files: list[Path] = field(default_factory=list)
    layers: int = 0
    folded: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Options:
    """What a conversion is asked for, beside its formats; see `convert_adapter`."""

    base: Base | None = None
    component: str | None = None
    rank: float | None = None
    drop: bool = False


class Source:
    """The files that a conversion reads: a folder, or one file.

    Arguments:
        path: the folder or the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.exists():
            raise ConversionError(f"{self.path} does not exist. Give an adapter's folder, or a .safetensors file.")

    @property
    def parts(self) -> dict[str, Path]:
        """The folders of the PEFT adapters that a folder holds, by component; "" for the folder itself."""
        if self.path.is_file():
            return {}
        if (self.path / CONFIG_NAME).is_file():
            return {"": self.path}
        return {c: self.path / c for c in COMPONENTS if (self.path / c / CONFIG_NAME).is_file()}

    @cached_property
    def file(self) -> Path:
        """The one file of tensors."""
        if self.path.is_file():
            return self.path
        found = sorted(p for p in self.path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))
        if len(found) != 1:
            what = listing([p.name for p in found]) if found else "no file of tensors"
            raise ConversionError(f"{self.path} holds {what}. Give the path of the one file to convert.")
        return found[0]

    @cached_property
    def keys(self) -> list[str]:
        """The names of the tensors; of a safetensors file only the header is read."""
        return list(self.header[0])

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What a safetensors file says about itself."""
        return self.header[1]

    @cached_property
    def header(self) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Shapes by key, and the metadata."""
        if self.file.suffix != ".safetensors":
            return {k: tuple(v.shape) for k, v in self.state.items()}, {}
        from .names import header

        return header(self.file)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        try:
            with open(self.file, "rb") as file:
                if file.read(4) == b"GGUF":
                    raise ConversionError(
                        f"{self.file} is a GGUF file. GGUF is only written: convert the adapter that it was made from."
                    )
            return read_weights(self.file)
        except (OSError, ValueError) as error:
            raise ConversionError(str(error)) from error


class Format:
    """One format; stateless."""

    name: ClassVar[str]
    text: ClassVar[str]  # for help
    holds: ClassVar[frozenset[str]] = frozenset()  # the features that it can express
    suffix: ClassVar[str] = ""  # of its file; "" for a folder
    file_name: ClassVar[str] = ""  # what its file is called in a folder
    whole_pipeline: ClassVar[bool] = False  # one file holds the parts of all models, so each needs its component

    def recognises(self, source: Source) -> bool:
        """Whether the files are of this format, from the names of their tensors."""
        return False

    def read(self, source: Source, options: Options) -> dict[str, Part]:
        """{component, or "" if it is not known: part}."""
        raise ConversionError(f"Files of the format {self.name!r} are written, not read.")

    def why(self, feature: str) -> str:
        """The reason why a feature cannot be held, as a further sentence, or nothing."""
        return ""

    def check(self, part: Part, options: Options) -> None:
        """Raise ConversionError for what no feature tells: ranks that are too large and the like."""

    def write(self, parts: Mapping[str, Part], out: Path, options: Options, report: Report) -> None:
        """Write all files, or none, and note them in the report."""
        raise ConversionError(f"Files of the format {self.name!r} are read, not written.")

    def place(self, out: Path) -> Path:
        """The file to write, for a format of one file."""
        return out if out.suffix == self.suffix else out / self.file_name


def write_safetensors(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any], report: Report) -> None:
    """One safetensors file, whole or not at all; metadata that is no text becomes JSON."""
    from safetensors.torch import save_file

    texts = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in metadata.items()}
    with staged(file.parent) as stage:
        alone = {k: t.clone(memory_format=torch.contiguous_format) for k, t in state.items()}  # no storage is shared
        save_file(alone, str(stage / file.name), metadata={"format": "pt", **texts})
    report.files.append(file)
