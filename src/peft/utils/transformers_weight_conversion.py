"""How the tensors of an adapter's file are named in a model that transformers loads by itself."""

from __future__ import annotations

import re
from typing import Any

from ..core.experts import rewrite
from ..lazy import names
from ..registry import PEFT_TYPE_TO_PREFIX_MAPPING

__getattr__, __dir__, _ = names(__name__, {"transformers.conversion_mapping": "get_model_conversion_mapping"})


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings for transformers' loader: `base_model.model.x.lora_A.weight` ->
    `x.lora_A.<adapter>.weight`.

    Arguments:
        weight_conversions: what the model's own checkpoints need; it follows ours.
        adapter_name: the adapter the tensors are for.
        peft_config: its configuration, which tells the prefix of its tensors.

    A DoRA magnitude is stored without `.weight` and has it in the model. The factors of each expert's projections
    become one pair for the stack that holds them now.
    """
    from .adapter_transforms import AdapterRenaming, of_experts

    kind = getattr(peft_config, "peft_type", None)
    name = PEFT_TYPE_TO_PREFIX_MAPPING.get(kind) or "lora_"
    prefix, given = re.escape(name), list(weight_conversions or [])
    renamings = [
        (r"^base_model\.model\.", ""),
        (rf"({prefix}(?!magnitude_vector)[^\.]*)", rf"\1.{adapter_name}"),
        (rf"({prefix}magnitude_vector)$", rf"\1.{adapter_name}.weight"),
    ]
    stacked = of_experts(given, name, adapter_name, peft_config) if kind == "LORA" else []
    return [AdapterRenaming(source, target) for source, target in renamings] + stacked + given


def convert_peft_config_for_transformers(peft_config: Any, model: Any, conversions: list[Any] | None) -> None:
    """Replace the names of modules that transformers has fused since by those of the parameters that hold them.

    Arguments:
        peft_config: the configuration, which is changed.
        model: the model it is for.
        conversions: the model's own; not needed.

    Raises ValueError if it names only one of the projections that one parameter holds.
    """
    rewrite(peft_config, model)
