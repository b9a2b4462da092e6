"""PEFT folders as SGLang loads them.

SGLang scales all layers by `lora_alpha / r`, whatever `use_rslora` and the patterns say, so that an adapter under
rsLoRA would be too weak by the root of its rank (its issue 40835): that goes into `lora_alpha`, patterns into B. The
server is told the largest rank and the modules. Source: docs.sglang.io, "LoRA Serving".
"""

from __future__ import annotations

from .vllm import Engine


class Sglang(Engine):
    """A PEFT folder within SGLang's limits."""

    name, engine = "sglang", "SGLang"
    text = "folder of a LoRA as SGLang scales it"

    def notes(self, r: int) -> list[str]:
        return [
            f"Start SGLang with --enable-lora --max-lora-rank {r} --lora-target-modules all, or with --lora-paths "
            "NAME=FOLDER, from which it reads both."
        ]
