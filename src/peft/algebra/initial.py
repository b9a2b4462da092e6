"""What training has changed of an adapter that started from a part of the base weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .resizing import tuner_of


def subtract_mutated_init(
    model: Any, output_state_dict: Mapping[str, Tensor], adapter_name: str, kwargs: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The tensors of a plain LoRA for the original base model: B A - B0 A0, of twice the rank and twice the alpha.

    Arguments:
        model: a PeftModel of LoRA.
        output_state_dict: the trained adapter's tensors by checkpoint key.
        adapter_name: a loaded adapter with its first factors A0, B0.
        kwargs: `state_dict`: the model's tensors by live name, to be used instead of the live ones.

    Raises TypeError for another method, ValueError if there is no such adapter, or it does not fit the trained one.
    """
    tuner = tuner_of(model)
    if not hasattr(type(tuner), "subtract_mutated_init"):
        raise TypeError(f"{type(tuner).__name__} holds no LoRA, whose first factors could be subtracted.")
    found: dict[str, Tensor] = tuner.subtract_mutated_init(output_state_dict, adapter_name, kwargs)
    return found
