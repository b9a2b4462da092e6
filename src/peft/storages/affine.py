"""Weights that are (q - zero) * scale: integers of a few bits, with a zero and a scale for each group of inputs.

A storage of this kind states where its integers lie, and for which modules they lie as published. Kernels reorder them
for some devices, each in its own way; such a layer is read through its own product with unit vectors, which is W
whatever the order, and is never written. So is one whose product with one vector is not what its tensors say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..core.storage import Packed, Payload
from .codes import packed, unpacked
from .scaled import place

ROWS = 1024  # unit vectors in one product
PARTS = ("codes", "zeros", "scale", "group")
FAR = 0.1  # how far, of its size, a product in half precision never is from the exact one
_agreeing: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Form:
    """How a layer's tensors hold its numbers.

    Attributes:
        shape: (O, I).
        bits: of an integer.
        first: "in" where codes lie as (I, O), zeros and scales as (G, O); "out" where as (O, I) and (O, G).
        codes, zeros: the axis along which integers are packed in words.
        order, tight: as `codes.unpacked` takes them.
        add: what is added to a stored zero; `wraps`: within the bits. Both readings of the largest then differ between
            kernels, so that it is never written.
        signed: integers of a sign, without zeros.
        group: inputs in a group, where no index tells it.
    """

    shape: tuple[int, ...]
    bits: int
    first: str = "in"
    codes: int = 0
    zeros: int = 1
    order: tuple[int, ...] = ()
    tight: bool = True
    add: int = 0
    wraps: bool = False
    signed: bool = False
    group: int = 0

    @property
    def top(self) -> int:
        """The largest integer, and the largest zero."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero of a symmetric range."""
        return int(2 ** (self.bits - 1))


class Affine(Packed):
    """Integers in groups. A subclass states `form`, and the names of its tensors in the order of `PARTS`."""

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    beside: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    checks: ClassVar[bool] = True  # that a layer multiplies with what its tensors say

    def form(self, module: Any) -> Form | None:
        """How the module's tensors lie, None where that is not published."""
        raise NotImplementedError

    def take(self, module: nn.Module, name: str) -> Payload:
        form = self.form(module)
        if form is None:
            return {**_tensors(module), "module": module}
        held = {part: getattr(module, own, None) for part, own in zip(PARTS, self.parts, strict=True)}
        return {**{k: None if t is None else t.detach() for k, t in held.items()}, "form": form, "module": module}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        if "form" in payload:
            for part, own in zip(PARTS, self.parts, strict=True):
                if payload[part] is not None:
                    place(module, own, payload[part])

    def unpack(self, payload: Payload) -> Tensor:
        module = payload["module"]
        if "form" not in payload or not self.agrees(module):
            return product(module, self.shape(module, "weight"))
        return self.numbers(payload)

    def agrees(self, module: nn.Module) -> bool:
        """Whether a layer multiplies with what its tensors say; a kernel may have reordered them in their places."""
        payload = self.take(module, "weight")
        if not self.checks or "form" not in payload or payload["codes"].is_meta or module in _agreeing:
            return _agreeing.get(module, True)
        W = self.numbers(payload)
        x = torch.linspace(1, 2 * W.shape[1], W.shape[1], dtype=torch.float32, device=W.device).sin().to(W.dtype)[None]
        try:
            with without_bias(module):
                found = module(x).float()
        except Exception:  # it cannot run where it is now, and may later
            return True
        wanted = x.float() @ W.T.float()
        _agreeing[module] = bool((found - wanted).norm() <= FAR * wanted.norm())
        return _agreeing[module]

    def written(self, payload: Payload) -> Form:
        """How a payload lies that is to be written; raises NotImplementedError where that is not known."""
        if "form" not in payload or not self.agrees(payload["module"]):
            refuse(payload["module"])
        form: Form = payload["form"]
        return form

    def numbers(self, payload: Payload) -> Tensor:
        """W, (O, I), from a payload that lies as published."""
        codes, zeros, scale, group = self.grouped(payload)
        numbers = codes.float().sub_(zeros[group]).mul_(scale[group])
        return numbers.T.to(payload["scale"].dtype).contiguous()

    def grouped(self, payload: Payload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(I, O) integers without a sign, their zeros and scales, (G, O) as float32, and the group of each input."""
        form: Form = payload["form"]
        (O, I), scale, index = form.shape, payload["scale"], payload["group"]
        length = form.group or -(-I // scale.shape[0 if form.first == "in" else 1])
        if index is None:
            index = torch.arange(I, device=scale.device) // length
        scale = _turned(scale, form).float()[:, :O]
        if payload["zeros"] is None:
            zeros = torch.full_like(scale, form.middle)
        else:
            zeros = _turned(_along(payload["zeros"], form.zeros, form), form)[: len(scale), :O] + form.add
            zeros = (zeros & form.top if form.wraps else zeros).float()
        return self.integers(payload), zeros, scale[: len(zeros)], index.long()

    def integers(self, payload: Payload) -> Tensor:
        """(I, O), without a sign."""
        form: Form = payload["form"]
        codes = _turned(_along(payload["codes"], form.codes, form), form)[: form.shape[1], : form.shape[0]]
        return (codes + form.middle) & form.top if form.signed else codes

    def pack(self, value: Tensor, payload: Payload) -> Payload:
        form = self.written(payload)
        v = value.detach().float().T
        _, zeros, scale, group = self.grouped(payload)
        new = _fitted(v, zeros, scale, group, payload)
        better = _error(v, *new, group, payload) < _error(v, zeros, scale, group, payload)
        zeros, scale = torch.where(better, new[0], zeros), torch.where(better, new[1], scale)
        made = {"scale": _laid(payload["scale"], _turned(scale, form))}
        if payload["zeros"] is not None:
            stored = _turned(((zeros - form.add).int()) & form.top, form)
            old = _along(payload["zeros"], form.zeros, form)
            made["zeros"] = _packed(_laid(old, stored), payload["zeros"], form.zeros, form)
        return self.repack(value, {**payload, **made})

    def repack(self, value: Tensor, payload: Payload) -> Payload:
        form = self.written(payload)
        codes, zeros, scale, group = self.grouped(payload)
        found = _rounded(value.detach().float().T, zeros[group], scale[group], form).int()
        return self.rewritten(torch.where(scale[group] == 0, codes, found), payload)

    def rewritten(self, codes: Tensor, payload: Payload) -> Payload:
        """The payload with other integers, (I, O), without a sign."""
        form: Form = payload["form"]
        codes = (codes - form.middle) & form.top if form.signed else codes
        old = _along(payload["codes"], form.codes, form)
        return {**payload, "codes": _packed(_laid(old, _turned(codes, form)), payload["codes"], form.codes, form)}

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        m: Any = module
        if hasattr(m, "infeatures"):
            return (m.outfeatures, m.infeatures)
        return (m.out_features, m.in_features)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        payload = self.take(module, name)
        scale = payload["scale"] if "form" in payload else _floating(payload)
        return torch.float16 if scale is None else scale.dtype


def product(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """W, (O, I), as a module multiplies with it: its product with unit vectors, without its bias."""
    held, made = _tensors(module), []
    some, dtype = next(iter(held.values())), getattr(_floating(held), "dtype", torch.float16)
    with without_bias(module):
        for start in range(0, shape[1], ROWS):
            rows = torch.arange(min(ROWS, shape[1] - start), device=some.device)
            x = torch.zeros(len(rows), shape[1], dtype=dtype, device=some.device)
            x[rows, rows + start] = 1
            made.append(module(x))
    return torch.cat(made).T.contiguous()


@contextmanager
def without_bias(module: nn.Module) -> Iterator[None]:
    """A module that adds nothing to its product."""
    table: Any = module._buffers if module._buffers.get("bias") is not None else module._parameters
    bias = table.get("bias")
    try:
        if bias is not None:
            table["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
        with torch.no_grad():
            yield
    finally:
        if bias is not None:
            table["bias"] = bias


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors but its bias."""
    held = {**module._parameters, **module._buffers}
    return {k: t.detach() for k, t in held.items() if t is not None and k != "bias"}


def _floating(payload: Payload) -> Tensor | None:
    """The scales, or else some tensor of the dtype that a module's product is likely to be in."""
    some = {k: t for k, t in payload.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return next((t for k, t in some.items() if k.endswith("scales")), next(iter(some.values()), None))


def refuse(module: nn.Module) -> NoReturn:
    """Raise NotImplementedError for a layer whose layout is not known, and which is to be written."""
    kind = type(module)
    raise NotImplementedError(
        f"No numbers can be written into a {kind.__module__}.{kind.__qualname__}: how its kernel lays out its weight "
        'is not published, or its settings are not. Merge with quantized="dequantize", keep the adapter unmerged, or '
        "load the base model with another kernel (for GPTQ and AWQ: the torch one)."
    )


def _turned(tensor: Tensor, form: Form) -> Tensor:
    """Between the order that is stored and inputs first, which is its own inverse."""
    return tensor if form.first == "in" else tensor.T


def _along(words: Tensor, axis: int, form: Form) -> Tensor:
    """The integers that are stored along an axis."""
    return unpacked(words.transpose(0, axis), form.bits, form.order, form.tight).transpose(0, axis)


def _packed(numbers: Tensor, words: Tensor, axis: int, form: Form) -> Tensor:
    made = packed(numbers.transpose(0, axis), form.bits, words.dtype, form.order, form.tight).transpose(0, axis)
    return made[: words.shape[0], : words.shape[1]].contiguous()


def _laid(old: Tensor, new: Tensor) -> Tensor:
    """New numbers in place of the first of the old ones; what pads them stays."""
    made = old.clone()
    made[: new.shape[0], : new.shape[1]] = new.to(old.dtype)
    return made


def _rounded(v: Tensor, zeros: Tensor, scale: Tensor, form: Form) -> Tensor:
    """The nearest integers to numbers."""
    return torch.where(scale == 0, zeros, v / scale + zeros).round_().clamp_(0, form.top)


def _fitted(v: Tensor, zeros: Tensor, scale: Tensor, group: Tensor, payload: Payload) -> tuple[Tensor, Tensor]:
    """Zeros and scales by the range of each group, which holds 0; symmetric where all zeros are the middle one."""
    form: Form = payload["form"]
    at = group[:, None].expand_as(v)
    low = torch.zeros_like(scale).scatter_reduce_(0, at, v, "amin")
    high = torch.zeros_like(scale).scatter_reduce_(0, at, v, "amax")
    symmetric = bool((zeros == form.middle).all())
    if symmetric:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    made = ((high - low) / form.top).to(payload["scale"].dtype).float()
    usable = (made > 0) & made.isfinite()
    made = torch.where(usable, made, scale)
    if symmetric:
        return zeros, made
    nearest = (-low / torch.where(made == 0, 1.0, made)).round().clamp_(form.add, form.top)
    return torch.where(usable, nearest, zeros), made


def _error(v: Tensor, zeros: Tensor, scale: Tensor, group: Tensor, payload: Payload) -> Tensor:
    """The sum of square errors in each group, (G, O), if numbers are held with these zeros and scales."""
    z, s = zeros[group], scale[group]
    held = (_rounded(v, z, s, payload["form"]) - z).mul_(s).to(payload["scale"].dtype)
    return torch.zeros_like(scale).index_add_(0, group, (held.float() - v).square_())
