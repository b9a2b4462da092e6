"""Counting the memory of a computation, done or only gone through.

`Ledger` watches every operation and knows how many bytes live in tensors, and the most that ever did. `Hollow` does the
same without computing: results get memory of the right size that nobody touches, so that the system never provides it.
Its tensors are torch's own on a CPU, and take every turn that those of a real run take.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = 2**22  # bytes: whole numbers of a model that are no more are copied, as they may choose a way
ZERO = 2**16  # bytes: what is no larger, and is not computed, is at least zero
BLANK = ("aten::zeros", "aten::zeros_like", "aten::new_zeros", "aten::zero_")  # whose numbers choose no way
CHOICES = {"aten::topk": 1, "aten::argmax": None}  # operations that choose, and which of their results is the choice
_SEEDED = torch.Tag.nondeterministic_seeded
_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Made(NamedTuple):
    """A tensor that an operation gives: its twin on the meta device, the argument whose memory it has, or is."""

    twin: Tensor
    of: int | None
    same: bool


class Ledger(TorchDispatchMode):
    """Counts the memory that operations make while it is entered, until nobody holds it any more.

    Attributes:
        live: bytes that are held now.
        peak: the most that were held at once; set it to `live` to begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the operation and note what it makes; classes that lay out others say themselves what they do to those."""
        if any(hasattr(t, "__tensor_flatten__") for t in types):
            return NotImplemented
        found = self.do(func, args, kwargs or {})
        self.hold(tensors_in(found))
        return found

    def do(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count the storages of some tensors, each once; the bytes of those that are new here."""
        before = self.live
        for tensor in (part for t in tensors for part in laid_out(t)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._held and tensor.device.type != "meta":
                self._held[key] = weakref.ref(storage, partial(self._gone, key)), storage.nbytes()
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return self.live - before

    def _gone(self, key: int, _: Any = None) -> None:
        self.live -= self._held.pop(key)[1]


class Hollow(Ledger):
    """A ledger under which nothing is computed but what follows from no weights: positions, masks, places from seeds.

    Attributes:
        guessed: operations whose result depends on numbers that are not there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.guessed: set[str] = set()
        self._unknown: set[int] = set()
        self._outlines: dict[Any, Any] = {}

    def make(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory in the shape and order of a tensor, on whatever device, that holds no numbers."""
        size, dtype = like.numel() * like.element_size(), dtype or like.dtype
        found = torch.empty_strided(like.size(), like.stride(), dtype=dtype, device="cpu")
        if size <= ZERO:
            found.zero_()
        self.hold([found])
        self._unknown.add(found.untyped_storage()._cdata)
        return found

    def do(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation: looked at, computed if it is small and known, or hollow."""
        if func.is_view or func.namespace == "prim":
            return func(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        known = not any(t.untyped_storage()._cdata in self._unknown for t in given)
        if any(tag in func.tags for tag in _VALUES) and not _counts(func, given):
            return self._look(func, args, kwargs, known)
        blank = func._schema.name in BLANK
        if known and not blank and (_SEEDED not in func.tags or kwargs.get("generator") is not None):
            return func(*args, **kwargs)  # which programs may keep beyond this run
        outline = self._outline(func, args, kwargs, given)
        if known and blank and not (isinstance(outline, Made) and _bulky(outline.twin)):
            return func(*args, **kwargs)
        if outline is None:
            return self._look(func, args, kwargs, known)
        self._forget(func, args, kwargs)
        found = _filled(outline, lambda made: self._give(func, made, given))
        if func._schema.name in CHOICES:
            place = CHOICES[func._schema.name]
            self._spread(found if place is None else found[place], func, args, kwargs)
        return found

    def _outline(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        """What an operation gives, as `Made`; kept, as layers are alike. None if torch knows of no shapes for it."""
        try:
            key = func, _key(args), _key(kwargs)
            if key in self._outlines:
                return self._outlines[key]
        except TypeError:  # a generator, say
            key = None
        twins = {id(t): torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta") for t in given}
        places = {twins[id(t)].untyped_storage()._cdata: i for i, t in enumerate(given)}
        own = {id(twins[id(t)]): i for i, t in enumerate(given)}

        def described(t: Tensor) -> Made:
            return Made(t, places.get(t.untyped_storage()._cdata), id(t) in own)

        try:
            found = func(*_swapped(args, twins), **_abroad(func, _swapped(kwargs, twins), bool(given)))
            if func._schema.name == "aten::_linalg_svd":  # whose last result lies by columns on a CPU alone
                found = *found[:2], found[2].mT.contiguous().mT
            outline = _mapped(found, described)
        except RuntimeError:  # as of products in groups, whose shapes torch tells of bfloat16 alone
            outline = None
        if key is not None:
            self._outlines[key] = outline
        return outline

    def _give(self, func: Any, made: Made, given: list[Tensor]) -> Tensor:
        if made.of is None:
            found = self.make(made.twin)
            sound = func._schema.name == "aten::all"  # as numbers that are not there are
            return found.fill_(True) if sound else found
        t = given[made.of]
        place = t.storage_offset() + made.twin.storage_offset()
        return t if made.same else t.as_strided(made.twin.size(), made.twin.stride(), place)

    def _spread(self, chosen: Tensor, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Let the rows of what nobody knows choose each in turn, as tokens do their experts; that is known then."""
        names = [a.name for a in func._schema.arguments]
        options = dict(zip(names, args, strict=False), **kwargs)
        scores, dim = args[0], options.get("dim", -1)
        if chosen.numel() == 0 or dim is None or scores.dim() == 0:
            return
        laid = chosen.movedim(dim, -1) if chosen.dim() == scores.dim() else chosen
        laid.copy_((torch.arange(chosen.numel(), device=laid.device) % scores.shape[dim]).view(laid.shape))
        self._unknown.discard(chosen.untyped_storage()._cdata)

    def _look(self, func: Any, args: Any, kwargs: dict[str, Any], known: bool) -> Any:
        """The result itself, which is what follows from zeros where numbers are not there."""
        found = func(*args, **kwargs)
        if not known:
            self._unknown.update(t.untyped_storage()._cdata for t in tensors_in(found))
            if torch.Tag.dynamic_output_shape in func.tags:
                self.guessed.add(func._schema.name.partition("::")[2])
        return found

    def _forget(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """What an operation would have written is known no longer."""
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else kwargs.get(argument.name)
                self._unknown.update(t.untyped_storage()._cdata for t in tensors_in(written))

    def _gone(self, key: int, _: Any = None) -> None:
        super()._gone(key)
        self._unknown.discard(key)


def laid_out(t: Tensor) -> Iterator[Tensor]:
    """A tensor, or those that its class lays out as one."""
    if not hasattr(t, "__tensor_flatten__"):
        yield t
        return
    for name in t.__tensor_flatten__()[0]:
        yield from laid_out(getattr(t, name))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors_in(v)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _bulky(t: Tensor) -> bool:
    return t.is_floating_point() and t.numel() * t.element_size() > EXACT


def _counts(func: Any, given: list[Tensor]) -> bool:
    """Whether it is an index of whole numbers, whose shape they do not change; one of truths keeps what is true."""
    return func._schema.name == "aten::index" and not any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])


def _mapped(value: Any, change: Any) -> Any:
    """The same nest with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, change) for v in value)
    return {k: _mapped(v, change) for k, v in value.items()} if isinstance(value, dict) else value


def _filled(outline: Any, give: Any) -> Any:
    """The same nest with tensors in place of `Made`."""
    if isinstance(outline, Made):
        return give(outline)
    return type(outline)(_filled(v, give) for v in outline) if isinstance(outline, list | tuple) else outline


def _key(value: Any) -> Any:
    """What of an argument decides shapes, to be looked up."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return tuple((k, _key(v)) for k, v in value.items()) if isinstance(value, dict) else (type(value), value)


def _swapped(value: Any, twins: dict[int, Tensor]) -> Any:
    return _mapped(value, lambda t: twins[id(t)])


def _abroad(func: Any, kwargs: dict[str, Any], given: bool) -> dict[str, Any]:
    """Arguments for the meta device, which has no generators and no pinned memory."""
    kwargs = {k: None if k in ("generator", "pin_memory") else v for k, v in kwargs.items()}
    takes = any(a.name == "device" for a in func._schema.arguments)
    return {**kwargs, "device": "meta"} if takes and (not given or kwargs.get("device") is not None) else kwargs
