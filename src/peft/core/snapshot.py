"""A model as it is now: its modules, tensors, hooks and flags, to be put back if a change fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..known import copied
from .deferred import Deferred
from .host import AdapterHost, below, changed, standing
from .layer import BaseTunerLayer

_TABLES = (
    "_modules",
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_keys",  # of an nn.ParameterDict
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_load_state_dict_post_hooks",
)

_PLAIN = (dict, list, set)
Undo = list[Callable[[], Any]]
_of_caller: ContextVar[tuple[nn.Module, Undo] | None] = ContextVar("of_caller", default=None)


@contextmanager
def taken_back_by(undo: Undo, model: nn.Module) -> Iterator[None]:
    """In the block, `placing` adds the steps that put this model back to the caller's, who takes them."""
    token = _of_caller.set((model, undo))
    try:
        yield
    finally:
        _of_caller.reset(token)


@contextmanager
def placing(model: nn.Module) -> Iterator[Undo]:
    """Put a model back as it was if the block fails, which gets a list for the steps that take its own back."""
    known = _of_caller.get()
    if known is not None and known[0] is model:
        yield known[1]
        return
    undo = first_steps(model)
    with _else(partial(take_back, undo)):
        yield undo


@contextmanager
def _else(restore: Callable[[], None]) -> Iterator[None]:
    """A block, and what is done if it fails."""
    try:
        yield
    except BaseException:
        restore()
        raise


def first_steps(model: nn.Module, everything: bool = False) -> Undo:
    """What has a model as it is now, once what will be placed in it has been taken out by steps that come after.

    Arguments:
        model: any model. One that holds no adapters yet notes its own attributes, as the steps of an injection
            take back all else.
        everything: note all of it, the numbers in its tensors aside.
    """
    found = below(model)[0]
    if everything or standing(found):
        return [snapshot(model)]
    training = [vars(m) for m in found if m.training]
    return [lambda: [values.update(training=True) for values in training], _noted([model], [model], [], [])]


def take_back(undo: Undo) -> None:
    """Take steps, the last first, and each once."""
    while undo:
        undo.pop()()


def attempts(
    model: nn.Module, config: Any, make: Callable[[bool], Any]
) -> tuple[Callable[[bool], tuple[Any, Callable[[], None]]], Callable[[], None]]:
    """What makes a PeftModel of a model as it is now, as often as need be, and what takes the last of them back.

    Arguments:
        model: the base model.
        config: of the first adapter; its fields are put back, too.
        make: makes the PeftModel, on the meta device if told so.
    """
    first, before = first_steps(model, config.is_prompt_learning), copied(config.__dict__)
    undo: Undo = []
    leave = partial(take_back, undo)

    def place(meta: bool) -> tuple[Any, Callable[[], None]]:
        leave()
        undo.extend([partial(config.__dict__.update, before), *first])
        with taken_back_by(undo, model):
            return make(meta), leave

    return place, leave


def whole(model: nn.Module) -> AbstractContextManager[None]:
    """Put a model back as it was if the block fails, the numbers in its tensors aside."""
    return _else(snapshot(model))


def unchanged(owner: Any, layers: Sequence[Any]) -> AbstractContextManager[None]:
    """Put what holds adapters back as it was if the block fails: switches, adapters, and merges that were undone.

    Arguments:
        owner: what switches the adapters.
        layers: what holds them.
    """
    return _else(noted_of(layers, [owner]))


def snapshot(model: nn.Module) -> Callable[[], None]:
    """What puts a model back as it is now, the numbers in its tensors aside.

    Arguments:
        model: any model; its children are looked at too.
    """
    found = below(model)[0]
    found = list(model.modules()) if standing(found) else found
    return _noted(found, [model], found, [])


def noted_of(layers: Sequence[Any], others: Sequence[Any] = ()) -> Callable[[], None]:
    """What puts these back as they are now, whose base layers stay as they are where nothing is merged."""
    homes = [m for x in layers for key, m in x._modules.items() if m is not None and key not in x._below]
    inner = [*homes]
    for m in inner:  # grows on the way
        inner += [child for child in m._modules.values() if child is not None]
    merged = [x.get_base_layer() for x in layers if x.merged and isinstance(x, BaseTunerLayer)]
    return _noted([*layers, *homes, *merged], others, [*inner, *merged], merged)


def _noted(
    modules: Sequence[Any], others: Sequence[Any], holding: Sequence[nn.Module], merged: Sequence[nn.Module]
) -> Callable[[], None]:
    """What puts modules and other objects back as they are now.

    Arguments:
        modules: their attributes, children, tensors and hooks.
        others: their attributes, and their configuration's.
        holding: whose tensors' flags count.
        merged: whose tensors may get other memory.
    """
    layers = [m for m in modules if isinstance(m, BaseTunerLayer)]
    calls = {id(c): c for x in (*layers, *others) if isinstance(c := x.__dict__.get("call"), Deferred)}
    for call in calls.values():
        call.settle()
    settings = [c for x in others if hasattr(c := getattr(x, "config", None), "__dict__")]
    adapters = [p for layer in layers for p in layer.adapters.values()]
    own = [*(m for m in modules if isinstance(m, AdapterHost)), *others]
    inner = [(v, v.copy()) for holder in own for v in vars(holder).values() if type(v) in _PLAIN and v]
    objects = [(vars(x), vars(x).copy()) for x in (*others, *settings, *calls.values(), *adapters)]
    owned = [(values, values.copy()) for values in map(vars, modules)]
    tables = [(table, table.copy()) for values, _ in owned for table in map(values.get, _TABLES) if table]
    tensors = _tensors(holding, merged)

    def restore() -> None:
        for values, before in objects + owned:
            for name in values.keys() - before.keys():
                del values[name]
            values.update(before)
        for values, _ in owned:
            for table in filter(None, map(values.get, _TABLES)):
                table.clear()
        for content, kept in inner + tables:
            content.clear()
            (content.extend if isinstance(content, list) else content.update)(kept)
        tensors()
        changed()
        for layer in layers:
            layer._replan()

    return restore


def _tensors(holding: Sequence[nn.Module], merged: Sequence[nn.Module]) -> Callable[[], None]:
    """What gives the parameters of `holding` their flags, and those of `merged` their memory."""
    flags = [(p, p.requires_grad) for m in holding for p in m._parameters.values() if p is not None]
    memory = [(p, p.data) for m in merged for p in m._parameters.values() if type(p) is nn.Parameter]

    def restore() -> None:
        for p, flag in flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
        for p, data in memory:
            if type(data) is Tensor and p.data_ptr() != data.data_ptr():
                p.data = data

    return restore
