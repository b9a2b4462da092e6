"""One forward of a model with prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .inputs import extended

if TYPE_CHECKING:
    from .holder import Prompts

OURS = frozenset({"task_ids", "input_type_mask", "adapter_names", "alora_offsets"})


def forward(
    prompts: Prompts, function: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any], labels: str
) -> Any:
    """Call the base model with the active prompt; without one, as it is.

    Arguments:
        prompts: of the model.
        function: the base model.
        args: what is given by position, in the order of the base model's forward.
        given: what is given by name.
        labels: see `inputs.extended`.
    """
    encoder = prompts.chosen(given)
    if encoder is None:
        return function(*args, **{k: v for k, v in given.items() if k not in OURS})
    if args:
        given = {**inspect.signature(prompts.model.forward).bind_partial(*args).arguments, **given}
    own = given.get("labels") if encoder.own_loss else None
    passed = {
        k: v for k, v in given.items() if k not in OURS - {"task_ids"} and not (k == "labels" and own is not None)
    }
    output = function(**extended(prompts, encoder, passed, labels))
    if own is not None:
        output.loss = encoder.loss(output.logits, own, given)
    return output
