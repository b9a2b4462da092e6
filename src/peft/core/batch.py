"""A batch whose samples are each under an adapter of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from . import host
from .banks import Banks, banks_of, own_product
from .call import BASE, Call
from .direct import EVERYWHERE, FORMS, FORWARD, TURNED, is_ordinary
from .method import Delta
from .rows import Groups
from .stack import Adapter, Stack
from .turns import turn
from .views import READS, Conv1DView, LinearView

peek_interpreter_stack = _C._functorch.peek_interpreter_stack
PRODUCTS = (LinearView, Conv1DView)  # views of layers of which calling may be W x + b and nothing else
Run = Callable[[tuple[Any, ...], dict[str, Any]], Any]  # a module, on arguments


NOT_ONE = (
    "adapter_names gives each sample an adapter of its own, but the module around {} reads one weight for "
    "the whole batch."
)


class Unfused(Tensor):
    """A weight that torch's fused layers leave alone, as they do every subclass, so that they call their children.

    It stands for several weights, so that nothing can be computed with it.
    """

    path: str

    @classmethod
    def of(cls, weight: Tensor, where: str) -> Tensor:
        """In place of a layer's weight, at a path."""
        found = weight.detach().as_subclass(cls)
        found.path = where
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "dim", "size", "is_floating_point"):
            return super().__torch_function__(func, types, args, kwargs)
        where = next((a.path for a in tree_leaves((args, kwargs)) if isinstance(a, cls)), "")
        raise ValueError(f"{NOT_ONE.format(repr(where))} Leave it out of mixed batches, or target that module itself.")


class MixedBatch(nn.Module):
    """The part of a tuner layer that runs a mixed batch; `stack`, `_runner` and `_general` are the layer's."""

    view: LinearView
    call: Call
    adapters: dict[str, Adapter]
    _merged: Sequence[str]
    _read: str
    _by_task: bool = False  # of the active adapters
    _by_input: bool = False
    get_base_layer: Callable[[], nn.Module]
    stack: Callable[..., Stack]
    _off: bool
    _runner: Callable[[Stack], Any]
    _general: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
    _live_names: Callable[[], tuple[str, ...]]
    _where: Callable[[], str]

    def _mixed(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each sample under its own adapter."""
        if self._merged:
            raise ValueError(
                f"adapter_names cannot be used while adapters are merged (here {self._merged}). Call unmerge_adapter()."
            )
        base, rest = self._modules["base_layer"], dict(kwargs)
        axis = 0 if getattr(base, "batch_first", True) else 1
        x = args[0] if args else next(iter(rest.values()))
        groups = self.call.groups(x.shape[axis], x.device, self._where(), names)
        root = self.stack(())
        if self.view.activations and not rest and len(args) == 1 and type(root) is Stack:
            return self._mixed_rows(root, x, groups)
        nobody = torch.empty(0, dtype=torch.int64, device=x.device)
        found = list(groups.items()) or [(BASE, nobody)]  # of no samples the base tells the shape
        return in_parts(self, "only", found, axis, args, rest, self._alone)

    def _mixed_rows(self, root: Stack, x: Tensor, groups: Groups) -> Tensor:
        """The base once for all rows, then the low-rank updates of all adapters at once, then others on their own."""
        names = tuple([n for n in groups.names if n != BASE and n in self.adapters])
        banked = banks_of(self, names) if names and self.view.dense and x.dim() > 1 else None
        rest = names if banked is None else [n for n in banked.rest if n in groups]
        if banked is not None and not rest:
            found = self._learnt(banked, x, groups) if torch.is_grad_enabled() else self._again(banked, x)
            if found is not None:
                return found
        y = root(x)
        # those that run the base on their rows themselves, or start from its output, may not find it changed
        out = self._mixed_rest(root, x, y, groups, rest)
        if banked is not None:
            own = not rest and own_product(root.base)
            for bank in banked.banks:
                out = bank.add(out, x, groups, own)
        return self.view.finish(root.base, out)

    def _swift(self, x: Any) -> Tensor | None:
        """`_mixed` without gradients, over an ordinary layer whose banks hold; None where it may be more than that.

        Not for graphs.
        """
        call, m = self.call, self._modules
        ledger, base, names = call.banks, m["base_layer"], call.names
        if (
            base is None
            or names is None
            or call._only is not None
            or call._wanted is not None
            or self._off
            or self._merged
        ):
            return None
        if type(x) is not Tensor or x.dim() < 2 or torch.is_grad_enabled() or _C._current_autograd_node() is not None:
            return None
        lifted = peek_interpreter_stack() is not None or forward_ad._current_level >= 0
        if lifted or type(self.view) not in PRODUCTS or call.owner != get_ident():
            return None
        kind, held, shape = type(base), base._parameters, x.shape
        if (FORWARD if kind is nn.Linear else FORMS.get(kind)) is not kind.forward or "forward" in base.__dict__:
            return None
        W = held.get("weight")
        if base._forward_hooks or base._forward_pre_hooks or any(EVERYWHERE):  # other hooks are for gradients
            return None
        if type(W) is not nn.Parameter or "bias" not in held:  # which some libraries take away
            return None
        banks: Banks | None = ledger.ready.pop(id(self), None) if ledger.numbers else None
        if banks is None or banks.table is not m:
            banks = ledger.take(self, True)
            if banks is None:
                return None
        groups = call.now
        if groups is None or groups.total != shape[0] or not (x.is_cpu if groups.on_cpu else x.device == groups.device):
            groups = call.groups(shape[0], x.device, "", names)  # rows of a layer with banks can be told apart
        served, steps = banks.served, banks.added
        if served[0] is not groups or served[1] != host._changes or served[2] != x.numel().bit_length():
            steps = banks.steps(self, groups, x)
        if steps is None:
            ledger.give_back(self, banks)
            return None
        return banks.over(x, W.mT if kind in TURNED else W, held["bias"], steps)

    def _ordinary(self, base: Any) -> bool:
        """Whether calling what stands below is a plain product with a plain weight, and nothing follows it."""
        plain = type(self.view) in PRODUCTS and is_ordinary(base)
        return plain and type(base._parameters.get("weight")) is nn.Parameter and "bias" in base._parameters

    def _learnt(self, banks: Banks, x: Tensor, groups: Groups) -> Tensor | None:
        """The same in training, where one operation is all of it."""
        base = self._modules["base_layer"]
        one = len(banks.banks) == 1 and hasattr(banks.banks[0], "over")
        return banks.banks[0].over(base, x, groups) if one and self._ordinary(base) else None

    def _again(self, banks: Banks, x: Tensor) -> Tensor | None:
        """The same without gradients as the next forward will find it, so that both give the same bits."""
        ledger = self.call.banks
        if torch.compiler.is_compiling() or ledger.get(self) is not banks:
            return None
        ledger.give_back(self, banks)
        return self._swift(x)

    def _mixed_rest(self, root: Stack, x: Tensor, y: Tensor, groups: Groups, names: Sequence[str]) -> Tensor:
        """Each adapter on its own rows."""
        out = y
        for name in names:
            p, index = self.adapters[name], groups[name]
            rows = x.index_select(0, index)
            with self.call.rows(index, x.shape[0]):
                part = (
                    p.method.onto(p, root, y.index_select(0, index), rows)
                    if isinstance(p.method, Delta)
                    else p.method.forward(p, root, rows)
                )
            out = out.index_copy(0, index, part)
        return out

    def each_task(self, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run) -> Any:
        """Run a whole module once per task on its rows; `where` it stands is for messages."""
        axis = 0 if getattr(self._modules["base_layer"], "batch_first", True) else 1
        x = args[0] if args else next(iter(kwargs.values()))
        groups = self.call.by_task(x.shape[axis], x.device, where)
        return in_parts(self, "task", groups, axis, args, kwargs, run)

    def _apart(self) -> Tensor | None:
        """Where rows have weights of their own and a parent that reads asks for one: what makes it call this layer.

        Raises ValueError if the parent never calls it.
        """
        mixed = is_mixed(self.call)
        if mixed and self._read == READS:
            text = NOT_ONE.format(repr(self._where()))
            raise ValueError(f"{text} Target the module itself, which then runs once for each adapter.")
        if self._read != READS and (mixed or self._by_input or (self._by_task and self.call.task is None)):
            return Unfused.of(self.view.read(self.get_base_layer()), self._where())
        return None

    def _alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer under the one adapter that the call names."""
        only = self.call.only
        stack = self.stack(self._live_names() if only is None else (only,))
        if stack.adapters:
            return self._general(self._runner(stack), args, kwargs)
        if self.view.activations or torch.compiler.is_compiling():
            return self._general(None, args, kwargs)
        with turn(stack.base):  # in which another thread may have put other weights
            return self._general(None, args, kwargs)


def in_parts(
    layer: Any,
    fact: str,
    groups: Sequence[tuple[Any, Tensor]],
    axis: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Run,
) -> Any:
    """Run a whole module once for each group of rows, and put the results back in order.

    Arguments:
        layer: the tuner layer around the module.
        fact: what of the layer's call is the group's own value meanwhile.
        groups: (value, rows) of each.
        axis: of the rows, in the module's main input and output.
        args, kwargs: the module's.
        run: runs it with such.
    """
    call, before = layer.call, getattr(layer.call, fact)
    indices = [index for _, index in groups]
    rows, parts = sum(map(len, indices)), []
    masks = layer.view.masks
    try:
        for value, index in groups:
            setattr(call, fact, value)
            if len(groups) == 1:
                return run(args, kwargs)
            take = rows_of(index, rows, axis)
            mine = tuple(_of_heads(a, index, rows) if i in masks else take(a) for i, a in enumerate(args))
            named = {k: _of_heads(a, index, rows) if k in masks else take(a) for k, a in kwargs.items()}
            with call.rows(index, rows):
                parts.append(run(mine, named))
    finally:
        setattr(call, fact, before)
    return join_parts(parts, torch.cat(indices).argsort(), axis)


def _of_heads(mask: Any, index: Tensor, rows: int) -> Any:
    """A mask, (queries, keys) for all rows or (rows heads, queries, keys), for some of them."""
    if not isinstance(mask, Tensor) or mask.dim() < 3:
        return mask
    return mask.unflatten(0, (rows, -1)).index_select(0, index).flatten(0, 1)


def is_mixed(call: Call) -> bool:
    """Whether the rows that run now have adapters of their own."""
    return not call.plain and call.only is None and call.fact("names") is not None


def rows_of(index: Tensor, rows: int, axis: int) -> Any:
    def take(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() > axis and value.shape[axis] == rows:
            return value.index_select(axis, index)
        return value.index_select(0, index) if value.dim() and value.shape[0] == rows else value

    return take


def join_parts(parts: list[Any], order: Tensor, axis: int) -> Any:
    """The results of groups of rows as one, in order; a module may give several for each, as routers of tokens do."""
    first = parts[0]
    if isinstance(first, Tensor):
        whole = torch.cat(parts, axis)
        each, left = divmod(whole.shape[axis], order.shape[0])
        if left:
            raise ValueError(
                f"A module of a mixed batch gives {whole.shape[axis]} rows for {order.shape[0]}, which cannot be told "
                "apart. Run each adapter on its own rows."
            )
        if each != 1:
            order = (order[:, None] * each + torch.arange(each, device=order.device)).flatten()
        return whole.index_select(axis, order)
    if isinstance(first, tuple):
        return tuple(
            None if column[0] is None else join_parts(list(column), order, axis if i == 0 else 0)
            for i, column in enumerate(zip(*parts, strict=True))
        )
    raise TypeError(f"Cannot assemble the output of a mixed batch from values of type {type(first).__name__}.")
