"""The low-rank adapters of a mixed batch: two batched products for all of them, however many they are.

Letters: S adapters, c rows of each, T positions of a row, d in-features, k out-features, r rank. A bank holds the
factors of S adapters of about one rank, padded with zeros: A (S, r, d), and B (S, r, k) with their scaling in it. With
the rows of x sorted by adapter, the update of all rows is x A' B. After Chen et al. 2023 (Punica), arXiv 2310.18547.

Without gradients a bank is kept for the layer's next forward, and made anew when anything that it was made of has
changed: a tensor was replaced, moved, or written (torch counts that), a plain value set, a module hooked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_, methodcaller
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import choice
from ..kernels.modes import transformed
from .direct import is_ordinary
from .stack import Adapter
from .views import SETTLED

PLAIN = (Tensor, nn.Parameter, nn.Buffer)
KEPT = 128  # adapters in a layer's banks that no longer take part in the batches
_version, _address = attrgetter("_version"), methodcaller("data_ptr")


class Segments(NamedTuple):
    """Rows of a batch by adapter, c of them for each slot of a bank.

    Attributes:
        slots: which slots of the bank, (S,); None for all in their order.
        adapters: S.
        rows: (S c,) of the batch; an adapter that has fewer repeats its first one. None: the batch is in this order.
        real: which of these are no repetition; None for all.
        to: the rows that these stand for.
    """

    slots: Tensor | None
    adapters: int
    rows: Tensor | None
    real: Tensor | None
    to: Tensor


class Groups(dict[str, Tensor]):
    """Row indices of each adapter of a batch, (rows of that adapter,) int64, and what follows from them.

    Arguments:
        rows: adapter -> its rows.
        total: rows of the batch.
        device: of the indices.
    """

    def __init__(self, rows: Mapping[str, list[int]], total: int, device: torch.device):
        super().__init__({n: torch.tensor(index, device=device) for n, index in rows.items()})
        self.lists, self.total, self.device, self.names = rows, total, device, tuple(rows)
        self._known: dict[tuple[str, ...], list[Segments]] = {}
        self.tables: dict[Any, Any] = {}  # what other kernels read

    def segments(self, order: tuple[str, ...]) -> list[Segments]:
        """The rows of the adapters that are in a bank's slots in this order; few, so that little is padding."""
        known = self._known.get(order)
        if known is None:
            here = [(slot, self.lists[n]) for slot, n in enumerate(order) if n in self.lists]
            largest, total = max((len(rows) for _, rows in here), default=0), sum(len(rows) for _, rows in here)
            tiers: dict[int, list[tuple[int, list[int]]]] = {}
            for slot, rows in here:
                alike = 0 if largest * len(here) <= 2 * total else (len(rows) - 1).bit_length()
                tiers.setdefault(alike, []).append((slot, rows))
            known = self._known[order] = [self._padded(tier, len(order)) for tier in tiers.values()]
        return known

    def _padded(self, tier: list[tuple[int, list[int]]], slots: int) -> Segments:
        size = max(len(rows) for _, rows in tier)
        padded = [i for _, rows in tier for i in rows + rows[:1] * (size - len(rows))]
        real = [j * size + i for j, (_, rows) in enumerate(tier) for i in range(len(rows))]
        to = [i for _, rows in tier for i in rows]

        def tensor(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, device=self.device)

        return Segments(
            None if len(tier) == slots else tensor([slot for slot, _ in tier]),
            len(tier),
            None if padded == list(range(self.total)) else tensor(padded),
            None if len(real) == len(padded) else tensor(real),
            tensor(to),
        )


class Bank(NamedTuple):
    """The factors of some adapters of a layer, which stand in the order of their names."""

    names: tuple[str, ...]
    A: Tensor
    B: Tensor

    def add(self, y: Tensor, x: Tensor, groups: Groups, own: bool) -> Tensor:
        """y and the update of each row of x (rows, ..., d) by its adapter; in y itself if that is nobody else's."""
        for at in groups.segments(self.names):
            A, B = self.A, self.B
            if at.slots is not None:
                A, B = A.index_select(0, at.slots), B.index_select(0, at.slots)
            rows = x if at.rows is None else x.index_select(0, at.rows)
            z = rows.to(A.dtype).reshape(at.adapters, -1, x.shape[-1])
            h = torch.bmm(z, A.mT)
            if at.rows is None and y.dtype is h.dtype is B.dtype:
                flat = y.reshape(at.adapters, -1, y.shape[-1])
                y = (flat.baddbmm_(h, B) if own else torch.baddbmm(flat, h, B)).view(y.shape)
                continue
            u = torch.bmm(h, B).view(-1, *y.shape[1:])
            u = u if at.real is None else u.index_select(0, at.real)
            if u.dtype is y.dtype:
                y = y.index_add_(0, at.to, u) if own else y.index_add(0, at.to, u)
            else:
                y = y.index_copy(0, at.to, (y.index_select(0, at.to) + u).to(y.dtype))
        return y


class Watch:
    """Tells whether what adapters of a layer compute their factors from is what it was."""

    def __init__(self, layer: Any, adapters: Sequence[Adapter]):
        d, self.layer, self.homes = layer.__dict__, layer._modules, list(layer._modules)
        self.places: list[tuple[Any, Any]] = [(d, "training"), (d, "cast_input_dtype_enabled"), (d, "view")]
        self.tensors: list[Tensor] = []
        self.hooks: list[Any] = []
        names = {p.name for p in adapters}
        for key, home in layer._modules.items():
            for name in names if key != "base_layer" else ():
                self._look(home._modules, name)
                for held in (home._parameters, home._buffers):
                    if name in held:
                        self._note(held, name)
        for p in adapters:
            for home in p.shared.values():
                self._note(home._parameters if p.name in home._parameters else home._buffers, p.name)
        self.look = [(place.get, key) for place, key in self.places]
        self.found = [get(key) for get, key in self.look]
        self.possible = all(type(t) in PLAIN and not t.is_inference() for t in self.tensors)  # else changes go unseen
        self.written, self.state = Adapter.written, self._state() if self.possible else ([], [])

    def _look(self, place: dict[str, Any], name: str) -> None:
        module = place.get(name)
        if module is None:
            return
        self.places.append((place, name))
        for child in module.modules():
            own = child.__dict__
            self.places.append((own, "forward"))
            if "_forward_hooks" in own:
                self.hooks += [child._forward_pre_hooks, child._forward_hooks]
            else:  # a lean module: it gets tables by its first hook
                self.places.append((own, "_forward_hooks"))
            if type(child) not in SETTLED:
                self.places += [(own, "training"), (own, "p")]
            for held in (child._parameters, child._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        self._note(held, key)

    def _note(self, place: Any, key: str) -> None:
        self.places.append((place, key))
        self.tensors.append(place[key])

    def _state(self) -> tuple[list[int], list[int]]:
        return list(map(_version, self.tensors)), list(map(_address, self.tensors))

    def unchanged(self) -> bool:
        """Whether nothing was replaced, moved, written or hooked."""
        return (
            self.written == Adapter.written
            and list(self.layer) == self.homes
            and all(map(is_, [get(key) for get, key in self.look], self.found))
            and not any(self.hooks)
            and self._state() == self.state
        )


class Banks:
    """The banks of one layer, and the adapters that are in none."""

    def __init__(self, layer: Any, names: Sequence[str]):
        self.adapters = [layer.adapters[n] for n in names if n in layer.adapters]
        alike: dict[Any, list[tuple[str, tuple[Tensor, Tensor, Any]]]] = {}
        self.rest: list[str] = []
        self.names = frozenset(names)
        for p in self.adapters:
            term = p.method.term(p)
            if term is None or any(type(f) not in PLAIN or f.dim() != 2 for f in term[:2]):
                self.rest.append(p.name)
            else:
                A, B, _ = term
                ragged = bool(choice.devices) and choice.banked(A, B)
                size = "any" if ragged else (A.shape[0] - 1).bit_length()
                alike.setdefault((A.dtype, A.device, size), []).append((p.name, term))
        self.banks: list[Any] = [
            choice.bank(terms) if size == "any" else stacked(terms) for (*_, size), terms in alike.items()
        ]
        self.watch: Watch | None = None

    def keep(self, layer: Any) -> None:
        """Stand for the layer's next forward too, where what the banks were made of can be watched."""
        learns = any(factor.requires_grad for bank in self.banks for factor in (bank.A, bank.B))
        if learns or any(p.method.reads for p in self.adapters):
            return  # gradients are for one time, and a base weight is not watched
        self.watch = Watch(layer, self.adapters)
        if self.watch.possible:
            layer.call.banks[layer] = self

    def hold(self) -> bool:
        """Whether they are still those of the layer, and no gradient of them is asked for."""
        watch = self.watch
        learns = torch.is_grad_enabled() and watch is not None and any(t.requires_grad for t in watch.tensors)
        return watch is not None and not learns and watch.unchanged()


def stacked(terms: list[tuple[str, tuple[Tensor, Tensor, Any]]]) -> Bank:
    """The bank of some adapters' (A, B, scaling)."""
    rank = max(A.shape[0] for _, (A, _, _) in terms)
    As, Bs, scales = [], [], []
    for _, (A, B, scale) in terms:
        room = rank - A.shape[0]
        As.append(F.pad(A, (0, 0, 0, room)) if room else A)
        Bs.append(F.pad(B.mT, (0, 0, 0, room)) if room else B.mT)
        scales.append(scale)
    A, B = torch.stack(As), torch.stack(Bs)
    if len(set(scales)) > 1:  # tensors count for themselves
        factors = [torch.as_tensor(s, dtype=B.dtype, device=B.device).reshape(1, 1) for s in scales]
        B = B * torch.stack(factors)
    else:
        B = B * scales[0]
    return Bank(tuple(name for name, _ in terms), A, B)


def banks_of(layer: Any, names: tuple[str, ...]) -> Banks:
    """The banks with these adapters of a layer, and perhaps with others; the kept ones where they still hold."""
    if transformed():
        return Banks(layer, names)
    known: Banks | None = layer.call.banks.get(layer)
    if known is not None and known.hold():
        if known.names.issuperset(names):
            return known
        old = known.names.difference(names)
        if len(old) <= KEPT:
            names = (*names, *(n for n in old if n in layer.adapters))
    layer.call.banks.pop(layer, None)
    fresh = Banks(layer, names)
    fresh.keep(layer)
    return fresh


def own_product(base: nn.Module) -> bool:
    """Whether nobody else can hold what a base layer gave."""
    return not torch.is_grad_enabled() and is_ordinary(base) and not transformed()
