"""W' of a layer made in blocks of rows, each checked to be finite, and its way into the base weight.

A block is a tile's worth of rows, made where it will stay if sums have the stored dtype, and else in a small wide
memory that is used again for the next one; so that a merge needs one tile beside the weights, however large they are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.modes import PLAIN
from . import storage
from .folding import ALL, Fold
from .kinds import stated_outside
from .lent import alike, own, put, same_memory
from .payload import finite
from .recycled import TILE_BYTES, empty_like
from .rounding import dense_twin, measured, store
from .stack import Stack
from .views import LinearView

CACHED_BYTES = 4 * 2**20  # of a block on the CPU, where more would leave the caches between two passes over it
PER_ELEMENT = 24  # bytes of the temporaries of a method that states nothing but its definition
_lent = threading.local()


@contextmanager
def one_scratch() -> Iterator[None]:
    """Inside, blocks of all layers are made in one memory."""
    outer, _lent.memory = getattr(_lent, "memory", None), {}
    try:
        yield
    finally:
        _lent.memory = outer


def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a block, with any numbers in it."""
    count, known = shape[0] * shape[1], getattr(_lent, "memory", None)
    if known is None:
        return torch.empty(shape, dtype=dtype, device=device)
    held: Tensor | None = known.get((dtype, device))
    if held is None or held.numel() < count:
        held = known[dtype, device] = torch.empty(count, dtype=dtype, device=device)
    return held[:count].view(shape)


def rows_of_a_tile(per_row: int, device: torch.device) -> int:
    """How many rows make a block.

    Arguments:
        per_row: bytes that a row takes beside the weights.
        device: where blocks are made.
    """
    most = min(TILE_BYTES, CACHED_BYTES) if device.type == "cpu" else TILE_BYTES
    return max(1, most // max(1, per_row))


def wide_bytes(W: Tensor) -> int:
    """Bytes of an element in the dtype of sums."""
    return max(4, W.element_size())


def filled(fold: Fold, W: Tensor, place: Tensor, known: bool = False) -> bool:
    """Make W' of W, (O, I), in memory of its form, which may be its own; False if not all of it is finite.

    Arguments:
        known: that it is finite is known.
    """
    out, inp = W.shape
    step = rows_of_a_tile(inp * wide_bytes(W), W.device)
    if step >= out:
        made = folded([fold], W, ALL, place)
        return known or finite(made)
    for start in range(0, out, step):
        made = folded([fold], W[start : start + step], slice(start, start + step), place[start : start + step])
        if not known and not finite(made):
            return False
    return True


def folds(stack: Stack, W: Tensor) -> list[Fold] | None:
    """What turns rows of W in turn into those of W', in place; None where they have to be made anew.

    Arguments:
        stack: the layer under some adapters.
        W: the base weight as it is now, (..., O, I).
    """
    if W.dim() != 2 or type(W) not in PLAIN or not stack.adapters or stack.layer.says_update():
        return None
    wide = torch.promote_types(W.dtype, torch.float32)
    found: list[Fold] = []
    for a in stack.adapters:
        fold = a.method.fold(a, wide, original=not found and not stack.layer._merged)
        if fold is None:
            return None
        found.append(fold)
    return found


def surely_finite(stack: Stack) -> bool:
    """Whether W' is finite, told from the largest number of W by a bound; False: only making it can tell."""
    view = stack.view
    if not _dense(stack) or (view.one_hot and stack.bias() is not None):
        return False
    W = stack.layer.base_weight()
    turn = folds(stack, W) if not W.is_meta else None
    return turn is not None and bounded(turn, W)


def bounded(turn: list[Fold], W: Tensor) -> bool:
    """Whether what these make of W, (O, I), is finite, told from its largest number; False: that cannot tell."""
    if not W.numel() or W.element_size() == 1:
        return False
    least, most = (t.item() for t in torch.aminmax(W))
    largest = max(-least, most)
    for fold in turn:
        largest = fold.bound(largest, W.shape[-1])
    return largest < torch.finfo(W.dtype).max / 2  # NaN is not


class Blocks:
    """The part of a tuner layer that writes W'; `stack`, `original_weight` and the rest are the layer's."""

    view: LinearView
    stack: Callable[..., Stack]
    get_base_layer: Callable[[], nn.Module]
    base_weight: Callable[[], Tensor]
    original_weight: Callable[[], Tensor]
    _stand_in: Callable[[nn.Module], None]
    _where: Callable[[], str]
    get_delta_weight: Callable[[str], Tensor]
    tied: dict[str, nn.Parameter] | None = None
    _saved: dict[str, Any] | None = None
    _rounding: str = "requantize"  # how a quantised weight takes a merge
    _dense_dtype: torch.dtype | None = None
    _packed_base: nn.Module | None = None  # what a dense twin stands for while merged

    @torch.no_grad()
    def check_finite(self, names: tuple[str, ...]) -> None:
        """Raise ValueError naming the layer if W' or b' of these adapters holds a value that is not finite."""
        stack = self.stack(names)
        b = self._bias(stack)
        if not surely_finite(stack):
            for _ in self._blocks(stack, b, None):
                pass

    @torch.no_grad()
    def tiles(self, names: tuple[str, ...], into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """W' in blocks of rows, (start, (..., rows, I)), each checked to be finite; before them b' is checked.

        Arguments:
            names: the adapters.
            into: memory in the stored form, in which blocks may be made; it may be the weight's own. None: a block
                holds until the next one.

        Raises ValueError naming the layer if a block holds a value that is not finite.
        """
        stack = self.stack(names)
        yield from self._blocks(stack, self._bias(stack), into)

    def says_update(self) -> bool:
        """Whether the update is what a program's own `get_delta_weight` gives."""
        return stated_outside(type(self), "get_delta_weight")

    def _as_said(self, stack: Stack) -> Tensor:
        W = stack.root.weight()
        for a in stack.adapters:
            W = W + self.view.matrix(stack.base, self.get_delta_weight(a.name)).to(W.dtype)
        return W

    def _bias(self, stack: Stack) -> Tensor | None:
        """b', checked; None for zeros that a layer without a bias does not need."""
        if self.view.bias(stack.base) is None and not self.view.one_hot:
            return None  # `check_merge` refuses others
        b = stack.bias()
        if b is not None and not finite(b):
            names = [a.name for a in stack.adapters]
            raise ValueError(f"Merging {names} into {self._where()!r} gives a bias that is not finite.")
        return b

    def _blocks(self, stack: Stack, b: Tensor | None, into: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        base, view = stack.base, self.view
        *lead, out, inp = view.shape(base)
        says = self.says_update()
        held = self.base_weight() if _dense(stack) and not says else None
        turn = None if held is None else folds(stack, held)
        step = out
        if held is not None and (turn or all(a.method.rowwise(a) for a in stack.adapters)):
            each = wide_bytes(held) if turn else PER_ELEMENT
            step = rows_of_a_tile(math.prod(lead) * inp * each, held.device)
        memory = None if into is None else view.matrix(base, into)
        for start in range(0, out, step):
            rows = slice(start, start + step) if step < out else ALL
            place = memory if memory is None or rows is ALL else memory[..., rows, :]
            if says:
                W = self._as_said(stack)
            elif turn is None or held is None:
                W = stack.weight(rows)
            else:
                W = folded(turn, held if rows is ALL else held[rows], rows, place)
            W = view.absorb(base, W, b[rows]) if view.one_hot and b is not None else W
            if not finite(W):
                raise ValueError(
                    f"Merging {[a.name for a in stack.adapters]} into {self._where()!r} gives weights that are not "
                    "finite. The adapter or the base weight holds NaN or infinity, or the sum leaves the range of the "
                    "dtype. Nothing was merged."
                )
            yield start, W

    @torch.no_grad()
    def _write(self, names: tuple[str, ...]) -> None:
        base, stack = self.get_base_layer(), self.stack(names)
        kind, b = storage.of(base, self.view.name), self._bias(stack)
        place = None if kind.packed else self._place(base)
        for start, W in self._blocks(stack, b, place):
            if place is not None:
                place = self._settled(base, place, start, W)
            elif not kind.packed:
                self.view.write_rows(base, start, W)
            elif self._rounding == "dequantize":
                base = self._make_dense(base, W)
            else:
                self.__dict__["merge_error"] = store(self, kind, self._rounding, W, self.original_weight())
        if place is not None and not same_memory(place, held := getattr(base, self.view.name)):
            held.data = place
        if b is not None and b is not self.view.bias(base) and not self.view.one_hot:
            put(base, self.view.bias_name, b)

    def _place(self, base: nn.Module) -> Tensor | None:
        """Where W' is put together: in other memory, if W is kept or others use it, and else in its own place.

        None where rows have to be handed to the view.
        """
        held = base._parameters.get(self.view.name)
        if held is None or type(held) is not nn.Parameter or type(held.data) is not Tensor:
            return None
        mine = own(base, self.view.name)
        kept = self.view.name in (self.tied or ()) or held.is_inference()
        if self._saved is not None:
            payload = self._saved[self.view.name][1]
            kept = kept or (isinstance(payload, Tensor) and same_memory(payload, held))
        return empty_like(held.data, TILE_BYTES) if mine and kept else held.detach()  # so that changes are counted

    def _settled(self, base: nn.Module, place: Tensor, start: int, W: Tensor) -> Tensor:
        """Rows of W' in their place; what is all of it, and nobody else's, is taken as it is."""
        raw = self.view.raw(base, W)
        if same_memory(raw, place):
            return place
        if alike(raw, place) and own(base, self.view.name) and not same_memory(raw, getattr(base, self.view.name)):
            return raw
        place.narrow(self.view.out_axis(base), start, W.shape[-2]).copy_(raw)
        return place

    def _make_dense(self, base: nn.Module, W: Tensor) -> nn.Module:
        before = self.view.read(base)
        wanted = W.to(before.dtype if self._dense_dtype is None else self._dense_dtype)
        if storage.of(base, self.view.name).keep_dense(base, self.view.name, self.view.raw(base, wanted).contiguous()):
            self.__dict__["merge_error"] = measured("dequantize", wanted, W, before)
            return base
        bias = self.view.bias(base)
        bias = bias if bias is None or self._dense_dtype is None else bias.to(self._dense_dtype)
        twin = dense_twin(self.view.label, base, self.view.raw(base, wanted), bias)
        self.__dict__["merge_error"] = measured("dequantize", wanted, W, before)
        if self._saved is not None:
            self.__dict__["_packed_base"] = base
        self._stand_in(twin)
        return twin


def _dense(stack: Stack) -> bool:
    """Whether the base weight is a tensor that holds its own numbers."""
    return stack.packed is None and type(storage.of(stack.base, stack.view.name)) is storage.Storage


def folded(turn: list[Fold], W: Tensor, rows: slice, place: Tensor | None) -> Tensor:
    """Rows of W' from those of W, in `place` if that is given."""
    kind = W.dtype
    wide = torch.promote_types(kind, torch.float32)
    if place is not None and kind is wide:
        V = place
        W = V if V.data_ptr() == W.data_ptr() else W
    else:
        turned = W.stride(0) < W.stride(1)  # as it lies
        V = scratch((W.shape[turned], W.shape[not turned]), wide, W.device)
        W = V = (V.mT if turned else V).copy_(W)
    for n, fold in enumerate(turn):
        if n and kind is not wide:
            V.copy_(V.to(kind))  # as each adapter alone would leave it
        fold(V if n else W, V, rows)
    if kind is wide:
        return V
    return V.to(kind) if place is None else place.copy_(V)
