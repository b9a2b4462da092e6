"""One forward of a model with prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..core.past import handed_past, past_body, past_in
from .checkpointed import Kept, Survivor, checkpoints
from .inputs import batch_of, extended
from .padding import as_in_front

if TYPE_CHECKING:
    from .holder import Prompts

OURS = frozenset({"task_ids", "input_type_mask", "adapter_names", "alora_offsets"})


def forward(prompts: Prompts, function: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Call the base model with the prompts of the call; without any, as it is.

    Arguments:
        prompts: of the model.
        function: the base model.
        args: what is given by position, in the order of the base model's forward.
        given: what is given by name.
    """
    chosen = prompts.chosen(given)
    if chosen == (None, None):
        return function(*args, **{k: v for k, v in given.items() if k not in OURS})
    if args:
        given = {**inspect.signature(prompts.model.forward).bind_partial(*args).arguments, **given}
    loss = chosen.own_loss if given.get("labels") is not None else None
    passed = {
        k: v for k, v in given.items() if k not in OURS - {"task_ids"} and not (k == "labels" and loss is not None)
    }
    inputs = extended(prompts, chosen, passed, prompts.labels())
    call = prompts.call
    call.virtual = chosen.tokens
    if chosen.front is not None:
        call.ids = given.get("input_ids")
        call.length = None if call.length is None else call.length + chosen.front.num_virtual_tokens
    kept = call.keys = _kept(prompts, chosen.cached, inputs)
    called, body = (function if loss is None else prompts.model), chosen.cached and past_body(prompts.model)
    if body is None or past_in(inputs) is None:
        output = called(**inputs)
    else:
        with handed_past(body, inputs) as others:
            output = called(**others)
    if kept is not None:
        kept.settle(output)
    if loss is None:
        return output
    logits = as_in_front(output.logits, given.get("attention_mask"), chosen.front)
    output.loss = loss[0].loss(logits, given["labels"], given, loss[1])
    return function.completed(output) if hasattr(type(function), "completed") else output  # type: ignore[attr-defined]


def _kept(prompts: Prompts, encoder: Any, inputs: dict[str, Any]) -> Kept | None:
    """The keys and values of a call whose layers are checkpointed; None where there are none, or they are not."""
    if encoder is None or not checkpoints(prompts.model):
        return None
    if prompts.survivor is None:
        prompts.survivor = Survivor(prompts.model, prompts.call)
    return Kept(prompts.model, encoder, batch_of(inputs), past_in(inputs))
