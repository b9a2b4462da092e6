"""PEFT folders as LoRAX loads them.

LoRAX scales all layers alike, and ignores layers that it does not adapt, embeddings among them, with a warning in its
log: they are refused here. Source: loraexchange.ai, "LoRA", and its table of target modules.
"""

from __future__ import annotations

from .vllm import Engine


class Lorax(Engine):
    """A PEFT folder within the limits of LoRAX."""

    name, engine = "lorax", "LoRAX"
    text = "folder of a LoRA within the limits of LoRAX"
    holds = frozenset()

    def notes(self, r: int) -> list[str]:
        return ["LoRAX ignores layers that it does not adapt in this architecture, and says so in its log."]
