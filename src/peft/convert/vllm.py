"""PEFT folders as vLLM loads them.

vLLM reads `r`, `lora_alpha` and `use_rslora`, and scales all layers alike: patterns go into B, and smaller ranks are
filled up with zeros. rsLoRA goes into `lora_alpha`, as other engines that load such folders (SGLang, LoRAX) divide it
by the rank whatever `use_rslora` says. vLLM refuses DoRA, modules_to_save and biases, and ranks above its largest
`max_lora_rank`. Source: docs.vllm.ai, `vllm.lora.peft_helper` and `vllm.config.lora` of version 0.14.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .folder import PeftFolder, write_folder
from .format import Options, Report, Source
from .part import ConversionError, Layer, Part, join

LARGEST, USUAL = 512, 256
REASONS = {
    "dora": "vLLM does not support DoRA.",
    "modules_to_save": "vLLM supports no modules_to_save.",
    "lora_bias": "vLLM has no biases of adapters.",
    "bias": "vLLM has no biases of adapters.",
    "conv": "vLLM adapts no convolutions.",
    "stacked": "vLLM has other keys for experts.",
}
KEPT = ("task_type", "base_model_name_or_path", "revision")


class Vllm(PeftFolder):
    """A PEFT folder within vLLM's limits."""

    name = "vllm"
    text = "folder of a LoRA within the limits of vLLM"
    holds = frozenset({"embedding"})

    def recognises(self, source: Source) -> bool:
        return False

    def why(self, feature: str) -> str:
        return REASONS.get(feature, "")

    def write(self, parts: Mapping[str, Part], out: Path, options: Options, report: Report) -> None:
        if len(parts) > 1:
            raise ConversionError(f"vLLM loads the adapter of one model, and these are {len(parts)}. Give `component`.")
        write_folder(_even(next(iter(parts.values())), report), out, report)


def _even(part: Part, report: Report) -> Part:
    """The part with one rank and one scaling for all layers, which is all that vLLM reads."""
    from ..methods.lora.config import LoraConfig

    layers, _ = part.split()
    r = max(x.rank for x in layers)
    if r > LARGEST:
        raise ConversionError(
            f"The rank {r} is more than vLLM's largest max_lora_rank, {LARGEST}. Give `rank`, to convert to a smaller "
            "one first (format 'lora')."
        )
    if r > USUAL:
        report.notes.append(f"The rank {r} needs a vLLM whose max_lora_rank goes beyond {USUAL}.")
    report.notes.append(f"Start vLLM with --enable-lora --max-lora-rank {_step(r)}.")
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
