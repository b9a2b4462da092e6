"""What dropout keeps: drawn quickly, held in one bit an element.

torch draws a number of its own for each element, which on the CPU costs more than the products beside it. Here 16
random bits decide: an element is kept if they are below a share of 65536, so that the rate holds to one part in that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .modes import once

LEVELS = 2**16
FEW = 2**12  # elements whose mask is not worth packing
_PACK = 0x0102040810204080  # multiplied with eight bytes of 0 and 1, it brings them together in the highest byte
_HIGHEST = 7 if sys.byteorder == "little" else 0


def draw(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Which elements a dropout of rate p keeps: bytes of 0 and 1, which multiply quicker than booleans."""
    level, size = round((1.0 - p) * LEVELS), prod(shape)
    if device.type != "cpu" or not 0 < level < LEVELS or not size:
        return torch.empty(shape, dtype=torch.uint8, device=device).bernoulli_(1.0 - p)
    bits = torch.empty(-(-size // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None).view(torch.int16)
    bits = bits[:size] if size % 4 else bits
    return torch.lt(bits.view(shape), level - LEVELS // 2).view(torch.uint8)


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout by `draw`; torch's own in graphs, and for DTensors and under vmap, which have rules for its draws."""
    if not p or p == 1.0 or torch.compiler.is_compiling() or hasattr(x, "placements") or _vectorised():
        return F.dropout(x, p) if p else x
    return x * draw(x.shape, p, x.device) * (1.0 / (1.0 - p))


def share(p: float) -> float:
    """What dropout multiplies the elements with that it keeps, if there are any."""
    return 1 / (1.0 - p) if p < 1 else 0.0


def _vectorised() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() is torch._C._functorch.TransformType.Vmap for level in stack)


def packed(mask: Tensor | None) -> Tensor | None:
    """A mask in an eighth of its memory, or a small one as it is."""
    return mask if mask is None or mask.numel() <= FEW else bits(mask)


def bits(mask: Tensor) -> Tensor:
    """A mask in an eighth of its memory."""
    flat = mask.reshape(-1)
    flat = F.pad(flat, (0, -flat.numel() % 8)) if flat.numel() % 8 else flat
    return (flat.view(torch.int64) * _PACK).view(torch.uint8)[_HIGHEST::8].clone()


def unpacked(held: Tensor | None, shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor | None:
    """The mask, from `packed`, as numbers of some dtype."""
    if held is None:
        return None
    return held.view(shape).to(dtype) if prod(shape) <= FEW else of_bits(held, shape, dtype)


def of_bits(held: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The mask, from `bits`, as numbers of some dtype."""
    size = prod(shape)
    found = _table(held.device, dtype).index_select(0, held.int()).view(dtype).view(-1)
    return (found[:size] if size % 8 else found).view(shape)


@once
def _table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The eight numbers of each value of `packed`, as many bytes in one number where that is possible."""
    with torch.inference_mode(False), torch.no_grad():
        values = torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1
        mask = values.to(torch.uint8)
        table = torch.empty(256, 8, dtype=torch.uint8, device="cpu")
        table[bits(mask).long()] = mask
        return (table.view(torch.int64) if dtype is torch.uint8 else table.to(dtype)).to(device)
