"""How the tensors of an adapter's file are named in a model that transformers loads by itself."""

from __future__ import annotations

import re
from typing import Any

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

    A DoRA magnitude is stored without `.weight` and has it in the model.
    """
    from transformers.core_model_loading import WeightRenaming

    kind = getattr(peft_config, "peft_type", None)
    prefix = re.escape(PEFT_TYPE_TO_PREFIX_MAPPING.get(kind) or "lora_")
    renamings = [
        (r"^base_model\.model\.", ""),
        (rf"({prefix}(?!magnitude_vector)[^\.]*)", rf"\1.{adapter_name}"),
        (rf"({prefix}magnitude_vector)$", rf"\1.{adapter_name}.weight"),
    ]
    return [WeightRenaming(source, target) for source, target in renamings] + list(weight_conversions or [])


def convert_peft_config_for_transformers(peft_config: Any, model: Any, conversions: list[Any] | None) -> None:
    """Adapt a configuration that was made for modules which transformers has fused since; nothing to do here.

    Raises NotImplementedError if it names the projections of experts that the model holds as one parameter.
    """
    targets = getattr(peft_config, "target_modules", None)
    experts = {"w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
    if not isinstance(targets, (set, list)) or not experts & set(targets):
        return
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    fused = [name for name, _ in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    gone = sorted((experts & set(targets)) - last)
    if fused and gone:
        raise NotImplementedError(
            f"target_modules has {gone}, but the model holds its experts as one parameter ('{fused[0]}'). Name "
            "parameters instead: target_parameters=['experts.gate_up_proj', 'experts.down_proj']."
        )
