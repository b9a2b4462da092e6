"""PEFT folders as vLLM loads them.

vLLM reads `r`, `lora_alpha` and `use_rslora`, and scales all layers alike: patterns go into B, and smaller ranks are
filled up with zeros. rsLoRA goes into `lora_alpha`, as other engines that load such folders (SGLang) divide it by the
rank whatever `use_rslora` says. vLLM refuses DoRA, modules_to_save and biases, and ranks above its largest
`max_lora_rank`. Source: docs.vllm.ai, `vllm.lora.peft_helper` and `vllm.config.lora` of version 0.14.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..core.entries import join
from .folder import PeftFolder, write_folder
from .format import Options, Report, Source
from .part import ConversionError, Layer, Part

LARGEST, USUAL = 512, 256
REASONS = {
    "dora": "{} does not support DoRA.",
    "modules_to_save": "{} supports no modules_to_save.",
    "lora_bias": "{} has no biases of adapters.",
    "bias": "{} has no biases of adapters.",
    "conv": "{} adapts no convolutions.",
    "stacked": "{} has other keys for experts.",
    "embedding": "{} adapts no embeddings.",
}
KEPT = ("task_type", "base_model_name_or_path", "revision")


class Engine(PeftFolder):
    """A PEFT folder with one rank and one scaling, lora_alpha / r, for a program that serves adapters."""

    engine: ClassVar[str]
    holds = frozenset({"embedding"})

    def recognises(self, source: Source) -> bool:
        return False

    def why(self, feature: str) -> str:
        return REASONS.get(feature, "").format(self.engine)

    def notes(self, r: int) -> list[str]:
        """What the user of a folder of that rank has to know; raises ConversionError if it is too large."""
        return []

    def write(self, parts: Mapping[str, Part], out: Path, options: Options, report: Report) -> None:
        if len(parts) > 1:
            raise ConversionError(
                f"{self.engine} loads the adapter of one model, and these are {len(parts)}. Give `component`."
            )
        part = next(iter(parts.values()))
        report.notes.extend(self.notes(max(x.rank for x in part.split()[0])))
        write_folder(_even(part, report), out, report)


class Vllm(Engine):
    """A PEFT folder within vLLM's limits."""

    name, engine = "vllm", "vLLM"
    text = "folder of a LoRA within the limits of vLLM"

    def notes(self, r: int) -> list[str]:
        if r > LARGEST:
            raise ConversionError(
                f"The rank {r} is more than vLLM's largest max_lora_rank, {LARGEST}. Give `rank`, to convert to a "
                "smaller one first (format 'lora')."
            )
        more = [f"The rank {r} needs a vLLM whose max_lora_rank goes beyond {USUAL}."] if r > USUAL else []
        return [*more, f"Start vLLM with --enable-lora --max-lora-rank {_step(r)}."]


def _even(part: Part, report: Report) -> Part:
    """The part with one rank and one scaling for all layers, which is all that engines read."""
    from ..methods.lora.config import LoraConfig

    layers, _ = part.split()
    r = max(x.rank for x in layers)
    alike = len({(x.rank, x.alpha) for x in layers}) == 1
    first = layers[0]
    alpha = r if not alike else first.scaling * r if first.settings.use_rslora else first.settings.lora_alpha
    same: dict[str, Any] = {"lora_alpha": alpha}
    if alike and first.settings.use_rslora:
        report.folded.append(f"the root of the rank under rsLoRA, into lora_alpha, {alpha:g}")
    if not alike:
        report.folded.append(f"scalings of the layers, into B; all have rank {r} now")
    same |= {name: getattr(part.config, name) for name in KEPT}
    new = LoraConfig(r=r, target_modules=sorted(x.path for x in layers), inference_mode=True, **same)
    return Part(new, {k: t for x in layers for k, t in _tensors(x, r, alike)}, part.noted)


def _tensors(layer: Layer, r: int, alike: bool) -> list[tuple[str, Tensor]]:
    A, B = layer.factor("A"), layer.factor("B")
    if not alike:
        A, B = F.pad(A, (0, 0, 0, r - layer.rank)), F.pad(scaled(B, layer.scaling), (0, r - layer.rank))
    ending = "" if layer.infix else ".weight"
    return [(join(layer.path, f"lora_{layer.infix}{side}{ending}"), t) for side, t in (("A", A), ("B", B))]


def scaled(B: Tensor, factor: float) -> Tensor:
    """B times a number, in its own dtype."""
    return B if factor == 1 else (B.double() * factor).to(B.dtype)


def _step(r: int) -> int:
    """The smallest value that `--max-lora-rank` may have for this rank."""
    return next(n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= r)
