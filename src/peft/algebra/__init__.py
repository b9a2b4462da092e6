"""Exact algebra of adapters: sums of updates, their truncation and comparison, and what becomes a LoRA."""

from __future__ import annotations

from .. import lazy

_NAMES = {
    "peft.algebra.combine": "TYPES Recipe",
    "peft.algebra.compare": "AdapterDiff LayerDiff diff",
    "peft.algebra.conversion": "Conversion convert_to_lora save_as_lora to_lora",
    "peft.algebra.extraction": "extract",
    "peft.algebra.initial": "subtract_mutated_init",
    "peft.algebra.intruders": "reduce_intruder_dimension",
    "peft.algebra.resizing": "resize",
    "peft.algebra.scale": "rescale_adapter_scale",
    "peft.algebra.weighted": "Report add_weighted_adapter",
}
__getattr__, __dir__, __all__ = lazy.names(__name__, _NAMES)
