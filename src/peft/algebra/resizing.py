"""A LoRA adapter at another rank."""

from __future__ import annotations

from typing import Any

from ..core.sharded import lent_back
from ..errors import check_adapters
from ..types import plain
from .combine import Recipe
from .conversion import check_rank
from .weighted import Report, add_weighted_adapter


def resize(model: Any, rank: float, adapter_name: str = "default", new_adapter_name: str = "resized") -> Report:
    """Add a copy of a LoRA adapter that has another rank; it is inactive and frozen.

    The copy is the nearest adapter of its rank, by a singular value decomposition of the factors; with a rank that is
    large enough it is the same function. DoRA's magnitudes, biases and whole modules are copied.

    Arguments:
        model: a PeftModel.
        rank: the rank of every layer, a whole number; or the share of the squared norm of each layer's update to keep,
            in (0, 1], for ranks that differ.
        adapter_name: the adapter; it stays as it is.
        new_adapter_name: the name of the copy.

    Returns the error and the rank of each layer, and warns if more than 1 % is left out.
    Raises ValueError for a rank that cannot be, an unknown or a taken name, or another method; the model is then
    unchanged.
    """
    check_rank(rank)
    tuner = tuner_of(model)
    configs = tuner.peft_config
    check_adapters([adapter_name], configs)
    kind = plain(configs[adapter_name].peft_type)
    if kind != "LORA":
        raise ValueError(
            f"The adapter {adapter_name!r} is {kind}, which has no factors to resize. Convert it to a LoRA of the rank "
            "you want: peft.convert_to_lora(model, rank)."
        )
    size = {"rank": rank} if isinstance(rank, int) else {"energy": rank}
    recipe = Recipe(
        "svd", **size, advice="Give a larger rank, or a share of the squared norm to keep, such as rank=0.9999."
    )
    lent_back(model)
    return add_weighted_adapter(tuner, [adapter_name], [1.0], new_adapter_name, recipe)


def tuner_of(model: Any) -> Any:
    """The tuner of a PeftModel, or of a model that is one itself."""
    for found in (model, getattr(model, "base_model", None)):
        if hasattr(type(found), "inject_adapter") and hasattr(found, "peft_config"):
            return found
    raise TypeError(f"Expected a PeftModel, but got {type(model).__name__}. Make one with get_peft_model.")
