"""EETQ: int8 weights with a scale for each output.

The tensor of int8 has the shape (I, O), but how its bytes lie depends on the device for whose kernel they were laid
out: row by row; or, for Turing and later, 16 rows in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15, then two columns
in turns of 64 rows, column by column. Bytes for a kernel are 128 more, and the second and third of each four have
changed places. A tensor does not say which. So a layer's product with unit vectors is held against every layout, and
the one that gives the very bytes is taken; where none does, the layer is read through that product and never written.
Sources: the shapes are those of transformers' `EetqLinear`; the orders of bytes are those of FasterTransformer's
mixed GEMM, for which no published description was at hand. That is why the layer's own product decides.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..core.storage import Payload
from .affine import Affine, Form, product, refuse
from .scaled import place

TILE, PAIR = 64, 2
ROWS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
SWAP = (0, 2, 1, 3)
LAYOUTS = ((False, False), (True, True), (False, True))  # in tiles, and as bytes for a kernel
_found: WeakKeyDictionary[nn.Module, tuple[bool, bool] | None] = WeakKeyDictionary()


class EETQ(Affine):
    """`EetqLinear` of transformers, whose weight is called `weight`, and of eetq, where it is `qweight`."""

    names = ("transformers.integrations.eetq.EetqLinear", "eetq.*EetqLinear")
    label = "eetq"
    beside = ("qweight", "weight_scales")
    checks = False  # `layout` does

    def form(self, module: Any) -> Form | None:
        return Form(self.shape(module, "weight"), 8, signed=True)

    def take(self, module: nn.Module, name: str) -> Payload:
        own: Any = module
        held = {"codes": own._buffers.get("qweight", getattr(own, "weight", None)), "scale": own.weight_scales}
        codes, scale = (t.detach() for t in held.values())
        settled = {"zeros": None, "group": None, "module": module, "form": self.form(module)}
        return {"codes": codes, "scale": scale.view(1, -1), **settled}

    def put(self, module: nn.Module, name: str, payload: Payload) -> None:
        own: Any = module
        place(module, "qweight" if "qweight" in own._buffers else "weight", payload["codes"])
        place(module, "weight_scales", payload["scale"].view(own.weight_scales.shape))

    def unpack(self, payload: Payload) -> Tensor:
        module = payload["module"]
        return product(module, self.shape(module, "weight")) if layout(module) is None else super().unpack(payload)

    def integers(self, payload: Payload) -> Tensor:
        return read(payload["codes"], known(payload)).int() + 128

    def rewritten(self, codes: Tensor, payload: Payload) -> Payload:
        return {**payload, "codes": laid((codes - 128).to(torch.int8), known(payload))}

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        own: Any = module
        rows, columns = own._buffers.get("qweight", getattr(own, "weight", None)).shape
        return (columns, rows)


def layout(module: Any) -> tuple[bool, bool] | None:
    """How a module's bytes lie, told by its product; None where no layout gives it."""
    if module not in _found:
        held = _storage.take(module, "weight")
        scale = held["scale"].float()
        W = product(module, held["form"].shape).T.float()
        seen = torch.where(scale == 0, 0, W / scale).round()
        right = (one for one in LAYOUTS if fits(held["codes"], one) and _same(held["codes"], one, seen, scale))
        _found[module] = next(right, None)
    return _found[module]


def known(payload: Payload) -> tuple[bool, bool]:
    """How a payload's bytes lie; raises NotImplementedError where that is not known."""
    found = layout(payload["module"])
    return refuse(payload["module"]) if found is None else found


def _same(codes: Tensor, how: tuple[bool, bool], seen: Tensor, scale: Tensor) -> bool:
    return bool((((read(codes, how).float() - seen) == 0) | (scale == 0)).all())


def fits(codes: Tensor, how: tuple[bool, bool]) -> bool:
    """Whether a layout has a place for each byte of a tensor (I, O)."""
    rows, columns = codes.shape
    return (not how[0] or (rows % TILE == 0 and columns % PAIR == 0)) and (not how[1] or columns % len(SWAP) == 0)


def laid(numbers: Tensor, how: tuple[bool, bool]) -> Tensor:
    """int8 numbers (I, O) as a layout has them."""
    (rows, columns), (tiled, biased) = numbers.shape, how
    made = numbers
    if tiled:
        made = made.unflatten(0, (-1, len(ROWS)))[:, list(ROWS)].flatten(0, 1)
        made = made.T.reshape(columns // PAIR, PAIR, rows // TILE, TILE).transpose(1, 2).reshape(rows, columns)
    if biased:
        bytes_ = (made.int() + 128).to(torch.uint8).reshape(-1, len(SWAP))[:, list(SWAP)]
        made = bytes_.view(torch.int8).reshape(rows, columns)
    return made.contiguous()


def read(stored: Tensor, how: tuple[bool, bool]) -> Tensor:
    """The inverse of `laid`."""
    (rows, columns), (tiled, biased) = stored.shape, how
    made = stored
    if biased:
        bytes_ = made.reshape(-1, len(SWAP))[:, list(SWAP)].contiguous().view(torch.uint8)
        made = (bytes_.int() - 128).to(torch.int8).reshape(rows, columns)
    if tiled:
        made = made.reshape(columns // PAIR, rows // TILE, PAIR, TILE).transpose(1, 2).reshape(columns, rows).T
        back = [ROWS.index(i) for i in range(len(ROWS))]
        made = made.unflatten(0, (-1, len(ROWS)))[:, back].flatten(0, 1)
    return made.contiguous()


_storage = EETQ()
