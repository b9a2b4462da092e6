"""The cache of keys and values among a model's arguments and answers, by whichever name the model has for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NAMES = ("past_key_values", "cache")  # of transformers; since 5.24 the second, and the first with a warning
OF_LAYERS = (*NAMES, "past_key_value", "layer_past")  # the last two in transformers 4


def name_among(names: Collection[str], known: tuple[str, ...] = NAMES) -> str | None:
    """The name of the cache among these, or None."""
    return next((name for name in known if name in names), None)


def past_in(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a forward, or None."""
    found = arguments.get("past_key_values")
    return arguments.get("cache") if found is None else found


def past_of(output: Any) -> Any:
    """The cache in the answer of a model, or None."""
    name = name_among(getattr(output, "__dict__", ()))
    return None if name is None else getattr(output, name)


def with_past(arguments: dict[str, Any], name: str | None, cache: Any) -> dict[str, Any]:
    """The arguments with this cache, by this name, in the place of theirs; a name of None leaves it out."""
    others = {key: value for key, value in arguments.items() if key not in NAMES}
    return others if name is None else {**others, name: cache}


def past_name(model: nn.Module) -> str | None:
    """The name of the cache among the arguments of the model's forward, or of its body's; None where neither takes one.

    A forward that hands on whatever it gets takes what a module of it takes; an encoder-decoder hands that on to its
    encoder.
    """
    named, anything = _of_forward(model)
    if named is not None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return named
    if not anything:
        body = past_body(model)
        return None if body is None else _of_forward(body)[0]
    inside = (_taken_by_class(type(m).forward)[0] for m in model.modules())
    return next((name for name in inside if name is not None), None)


def past_body(model: nn.Module) -> nn.Module | None:
    """The body of a model whose forward takes no cache, while that of its body does; None for others.

    So are heads of transformers 4 that make classes.
    """
    named, anything = _of_forward(model)
    body = None if named is not None or anything else getattr(model, "base_model", None)
    return body if isinstance(body, nn.Module) and body is not model and _of_forward(body)[0] is not None else None


@contextmanager
def handed_past(body: nn.Module, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments without their cache, which within the block is given to the body of the model.

    Raises ValueError unless the body runs once.
    """
    name, runs = _of_forward(body)[0], []

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        runs.append(module)
        return args, with_past(kwargs, name, past_in(arguments))

    hook = body.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield with_past(arguments, None, None)
    finally:
        hook.remove()
    if len(runs) != 1:
        raise ValueError(
            f"The model's forward takes no past_key_values, so that a prompt's keys and values go to its "
            f"{type(body).__name__}. But that ran {len(runs)} times, not once. Use prompt tuning."
        )


def _of_forward(model: nn.Module) -> tuple[str | None, bool]:
    own = "forward" in model.__dict__ or torch.compiler.is_compiling()  # its own may hold a model: it is not remembered
    return (_taken if own else _taken_by_class)(model.forward if own else type(model).forward)


def _taken(forward: Any) -> tuple[str | None, bool]:
    """(the name of the cache among the arguments, whether any other name is one)."""
    found = inspect.signature(forward).parameters
    return name_among(found), any(p.kind is p.VAR_KEYWORD for p in found.values())


_taken_by_class = functools.lru_cache(maxsize=256)(_taken)
