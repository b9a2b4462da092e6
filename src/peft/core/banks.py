"""The low-rank adapters of a mixed batch: two batched products for all of them, however many they are.

Letters: S adapters, c rows of each, T positions of a row, d in-features, k out-features, r rank. A bank holds the
factors of S adapters of about one rank, padded with zeros: A (S, r, d), and B (S, r, k) with their scaling in it. With
the rows of x sorted by adapter, the update of all rows is x A' B. After Chen et al. 2023 (Punica), arXiv 2310.18547.

A bank is kept for the layer's next forward, and made anew when anything that it was made of has changed: a tensor was
replaced, moved, or written (torch counts that), a plain value set, a module hooked (`watch`). In training the numbers
are collected each time, and what is kept is where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import choice, grouped
from ..kernels.modes import HELD, transformed
from . import host
from .direct import is_ordinary, matrix
from .method import Delta
from .rows import Groups, Segments
from .watch import Watch

KEPT = 128  # adapters in a layer's banks that no longer take part in the batches
_learns = attrgetter("requires_grad")
Term = tuple[str, tuple[Any, ...]]
Steps = list[tuple[Callable[..., Tensor], tuple[Any, ...]]]  # each called with y, x and these


class Bank:
    """The factors of some adapters of a layer.

    Arguments:
        terms: (name, (A (r, d), B (k, r), scaling)) of each, or with a gain (k,) besides (`Method.term`).
        own: whether A and B are the adapters' own tensors, and no results of them.
        bias: finds that of the base, which gains leave out.
    """

    def __init__(self, terms: Sequence[Term], own: bool, bias: Callable[[], Tensor | None]):
        self.names, self.own, self.bias = tuple(name for name, _ in terms), own, bias
        self.As, self.Bs, self.scales, *gains = zip(*(term for _, term in terms), strict=True)
        self.G = torch.stack(gains[0]) if gains else None
        alike = len({A.shape for A in self.As}) == len({B.shape for B in self.Bs}) == len(set(self.scales)) == 1
        leaves = own and alike and all(type(t) is nn.Parameter for t in (*self.As, *self.Bs))
        self.scale = self.scales[0] if leaves and type(self.scales[0]) is float else None
        self._made: tuple[Tensor, Tensor] | None = None
        self._at: tuple[Groups, list[Segments]] | None = None
        self._steps: tuple[Groups, int, tuple[Tensor, Tensor], Steps] | None = None
        self._finite: tuple[Tensor, bool] | None = None

    def stacked(self) -> tuple[Tensor, Tensor]:
        """(A, B); kept where no gradient goes through them."""
        made = self._made
        if made is None or (torch.is_grad_enabled() and self.own and self.learns()):
            made = grouped.stacked(self.As, self.Bs, self.scales)
            self._made = None if made[0].requires_grad or made[1].requires_grad else made
        return made

    def learns(self) -> bool:
        """Whether some factor wants a gradient."""
        return any(map(_learns, self.As)) or any(map(_learns, self.Bs))

    def at(self, groups: Groups) -> list[Segments]:
        """`Groups.segments` of this bank."""
        if self._at is None or self._at[0] is not groups:
            self._at = groups, groups.segments(self.names)
        return self._at[1]

    def add(self, y: Tensor, x: Tensor, groups: Groups, own: bool) -> Tensor:
        """y and the update of each row of x (rows, ..., d) by its adapter; in y itself if that is nobody else's."""
        gradients = torch.is_grad_enabled()
        if gradients and self.learns() and grouped.learnt(y, x, None, self.As[0]):
            parts = [(at, self._factors(at)) for at in self.at(groups)]
            if all(factors is not None for _, factors in parts):
                for at, factors in parts:
                    y = grouped.update(y, x, None, None, at, self.scale, *factors)  # type: ignore
                return y
        if not gradients and self.G is None and not transformed():
            for add, given in self.steps(groups, x.numel() // max(1, x.shape[-1])):
                y = add(y, x, *given[:-1], own)
            return y
        made = self._made if self._made is not None and not gradients else self.stacked()
        held = made if self.G is None else (*made, self.G)
        for at in self.at(groups):
            a, b, *g = held if at.slots is None else [t.index_select(0, at.slots) for t in held]
            y = grouped.gained(y, x, a, b, g[0], self.bias(), at, own) if g else grouped.add(y, x, a, b, at, own)
        return y

    def steps(self, groups: Groups, rows: int) -> Steps:
        """What adds the updates to y in place without gradients: of the adapters that take part, by some input's size.

        Of factors without gains.

        Arguments:
            groups: the batch.
            rows: of features, in the input.
        """
        held, known = self.stacked(), self._steps
        size = rows.bit_length()
        if known is None or known[0] is not groups or known[1] != size or known[2] is not held:
            known = self._steps = (groups, size, held, self._beside(held, groups, rows) or self._apart(held, groups))
        return known[-1]

    def _apart(self, held: tuple[Tensor, Tensor], groups: Groups) -> Steps:
        parts = [
            (at, held if at.slots is None else [t.index_select(0, at.slots) for t in held]) for at in self.at(groups)
        ]
        return [(grouped.add, (A, B, at, True)) for at, (A, B) in parts]

    def _beside(self, held: tuple[Tensor, Tensor], groups: Groups, rows: int) -> Steps | None:
        A, B = held
        here = [slot for slot, name in enumerate(self.names) if name in groups]
        if not here or not grouped.suits(A, len(here), rows):
            return None
        if self._finite is None or self._finite[0] is not B:
            self._finite = B, math.isfinite(B.sum().item())
        if not self._finite[1]:
            return None
        if len(here) < len(self.names):
            A, B = A[here], B[here]
        own = groups.columns(tuple(self.names[slot] for slot in here), A.shape[1], grouped.BITS[A.dtype])
        return [(grouped.beside, (A.flatten(0, 1).mT, B.flatten(0, 1), own, True))]

    def over(self, base: nn.Module, x: Tensor, groups: Groups) -> Tensor | None:
        """The layer's output in one operation, in training over an ordinary base; None where that is not possible."""
        found, (held, b) = self.at(groups), (base._parameters["weight"], base._parameters["bias"])
        if len(found) != 1 or held is None or x.dim() < 2:
            return None
        if not grouped.learnt(None, x, W := matrix(base, held), self.As[0]):
            return None
        factors = self._factors(found[0])
        return None if factors is None else grouped.update(None, x, W, b, found[0], self.scale, *factors)  # type: ignore

    def _factors(self, at: Segments) -> tuple[Tensor, ...] | None:
        """Those that take part, if all of them are leaves of one form that learn."""
        if self.scale is None:
            return None
        As, Bs = self.As, self.Bs
        if at.slots is not None:
            As, Bs = tuple(As[i] for i in at.members), tuple(Bs[i] for i in at.members)
        return (*As, *Bs) if all(map(_learns, As)) and all(map(_learns, Bs)) else None


class Banks:
    """The banks of one layer, and the adapters that are in none."""

    def __init__(self, layer: Any, names: Sequence[str]):
        self.adapters = [layer.adapters[n] for n in names if n in layer.adapters]
        self.watch = Watch() if transformed() else Watch.on(layer, self.adapters)
        alike: dict[Any, list[Term]] = {}
        self.rest: list[str] = []
        self.names = frozenset(names)
        mine = frozenset(map(id, self.watch.tensors))
        for p in self.adapters:
            term = None if isinstance(p.method, Delta) and p.method.drop_rate(p) else p.method.term(p)
            if term is None or p.method.up_bias(p) is not None or not _usable(layer, *term):
                self.rest.append(p.name)
            else:
                A, B, _, *gain = term
                ragged = bool(choice.devices) and not gain and choice.banked(A, B)
                size = "any" if ragged else (A.shape[0] - 1).bit_length()
                own = id(A) in mine and id(B) in mine
                alike.setdefault((A.dtype, A.device, bool(gain), own, size), []).append((p.name, term))
        if any(gained for _, _, gained, *_ in alike) and not transformed():
            self.watch.add(layer._modules, "base_layer", layer.get_base_layer()._parameters, layer.view.name)
        bias = partial(layer.view.bias, layer.get_base_layer())
        self.banks: list[Any] = [
            choice.bank(terms) if size == "any" else Bank(terms, own, bias) for (*_, own, size), terms in alike.items()
        ]
        self.own = all(getattr(bank, "own", False) for bank in self.banks)
        self.table = layer._modules
        self.served: tuple[Groups | None, int, int] = (None, -1, -1)  # what `added` is for
        self.added: Steps | None = None
        self.whole: tuple[Tensor, Tensor, Segments, Tensor] | None = None  # of `grouped.ordered`, where that is all

    def keep(self, layer: Any) -> None:
        """Stand for the layer's next forward too, where what the banks were made of can be watched."""
        made = [t for bank in self.banks if not getattr(bank, "own", False) for t in _made(bank)]
        if (torch.is_grad_enabled() and any(map(_learns, made))) or any(p.method.reads for p in self.adapters):
            return  # gradients are for one time, and a base weight is not watched
        if self.watch.possible:
            layer.call.banks[layer] = self

    def learns(self) -> bool:
        """Whether a gradient of some tensor is wanted now."""
        return torch.is_grad_enabled() and any(map(_learns, self.watch.tensors))

    def steps(self, layer: Any, groups: Groups, x: Tensor) -> Steps | None:
        """What adds the updates of a batch to y without gradients; None where some adapter of it is in no bank.

        Kept for inputs of about as many rows, until a layer has other adapters.
        """
        here = [n for n in groups.names if n in layer.adapters]
        known = self.names.issuperset(here) and {*self.rest}.isdisjoint(here)
        rows = x.numel() // max(1, x.shape[-1])
        self.added = [step for bank in self.banks for step in _steps(bank, groups, rows)] if known else None
        self.whole = None
        if self.added is not None and len(self.added) == 1 and self.added[0][0] is grouped.add:
            A, B, at, _ = self.added[0][1]
            if at.rows is not None and at.real is None and len(at.to) == groups.total and A.dtype is B.dtype:
                self.whole = A, B, at, at.to.argsort()
        self.served = groups, host._changes, x.numel().bit_length()
        return self.added

    def over(self, x: Tensor, W: Tensor, b: Tensor | None, steps: Steps) -> Tensor:
        """W x + b and what these add to it."""
        whole = self.whole
        if whole is not None and x.dtype is W.dtype is whole[0].dtype and not torch._C._is_any_autocast_enabled():
            return grouped.ordered(x, W, b, *whole)
        y = F.linear(x, W, b)
        for add, given in steps:
            y = add(y, x, *given)
        return y


def _steps(bank: Any, groups: Groups, rows: int) -> Steps:
    return bank.steps(groups, rows) if isinstance(bank, Bank) and bank.G is None else [(bank.add, (groups, True))]


def _usable(layer: Any, A: Tensor, B: Tensor, scale: Any, gain: Tensor | None = None) -> bool:
    """Whether such factors can stand in a bank; a gain depends on the base weight, which must be one to watch."""
    plain = all(type(f) in HELD and f.dim() == 2 for f in (A, B))
    return plain and (gain is None or type(layer.get_base_layer()._parameters.get(layer.view.name)) is nn.Parameter)


def _made(bank: Any) -> tuple[Tensor, ...]:
    if not isinstance(bank, Bank):
        return bank.A, bank.B
    return (*bank.As, *bank.Bs) if bank.G is None else (*bank.As, *bank.Bs, bank.G)


def banks_of(layer: Any, names: tuple[str, ...]) -> Banks:
    """The banks with these adapters of a layer, and perhaps with others; the kept ones where they still hold."""
    if transformed():
        return Banks(layer, names)
    ledger, gradients = layer.call.banks, torch.is_grad_enabled()
    known: Banks | None = ledger.take(layer, not gradients)
    if known is not None and gradients and not (known.own if known.learns() else known.watch.unwritten()):
        known = None  # what was computed without gradients has none, and numbers were not looked at
    if known is not None:
        if known.names.issuperset(names):
            return known
        old = known.names.difference(names)
        if len(old) <= KEPT:
            names = (*names, *(n for n in old if n in layer.adapters))
    if layer in ledger:
        del ledger[layer]
    if torch.is_inference_mode_enabled():  # whose tensors are of no use to a later forward with gradients
        with torch.inference_mode(False), torch.no_grad():
            return _fresh(layer, names)
    return _fresh(layer, names)


def _fresh(layer: Any, names: tuple[str, ...]) -> Banks:
    fresh = Banks(layer, names)
    if not fresh.learns():
        fresh.watch.note()
        for bank in fresh.banks:
            if isinstance(bank, Bank):
                bank.stacked()
    fresh.keep(layer)
    return fresh


def own_product(base: nn.Module) -> bool:
    """Whether nobody else can hold what a base layer gave."""
    return not torch.is_grad_enabled() and is_ordinary(base) and not transformed()
