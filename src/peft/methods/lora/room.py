"""Room for a larger rank: factors padded with zeros in memory, so that adapters of several ranks fit the same tensors.

A zero row of A beside any column of B adds nothing. Files hold the factors without the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.stack import Adapter

_OF_RANK = {"lora_A.weight": 0, "lora_B.weight": 1}  # the axis of a linear layer's factors
_BESIDE = {"lora_first_A": 0, "lora_first_B": 1, "lora_diag": 0}  # the same, behind the axes of stacked matrices


def padded(p: Adapter, key: str, value: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A factor of a smaller rank with zeros up to `shape`; None where that is not what makes it fit."""
    axis, blocks = _axis(p, key)
    same = [a == b for i, (a, b) in enumerate(zip(value.shape, shape, strict=False)) if i != axis]
    if axis is None or value.dim() != len(shape) or not all(same):
        return None
    if value.shape[axis] > shape[axis] or value.shape[axis] % blocks or shape[axis] % blocks:
        return None
    full = value.new_zeros(shape)
    parts = value.unflatten(axis, (blocks, -1))
    full.unflatten(axis, (blocks, -1)).narrow(axis + 1, 0, parts.shape[axis + 1]).copy_(parts)
    return full


def window(p: Adapter, key: str, held: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The part of a factor that one of a smaller rank fills; None where its ranks lie in several places."""
    axis, blocks = _axis(p, key)
    if axis is None or blocks > 1 or held.dim() != len(shape) or shape[axis] > held.shape[axis]:
        return None
    part = held.narrow(axis, 0, shape[axis])
    return part if part.shape == tuple(shape) else None


def fill(p: Adapter, A: Tensor, B: Tensor) -> None:
    """Write (..., r, I) and (..., O, r) into an adapter's factors, which may have more room."""
    view, base = p.layer.view, p.layer.get_base_layer()
    values = dict(zip((0, 1), view.held(base, A, B), strict=True))
    for slot in p.layer.slots(p.name):
        axis, _ = _axis(p, slot.key)
        if axis is not None and slot.key not in _BESIDE:
            shape = list(slot.tensor.shape)
            value = values[axis].reshape([*shape[:axis], -1, *shape[axis + 1 :]])
            slot.tensor.copy_(value if value.shape == slot.tensor.shape else padded(p, slot.key, value, shape))


def wide(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(..., r, I) and (..., O, r) with zeros up to a rank, if they have less."""
    more = max(rank - A.shape[-2], 0)
    return (pad(A, (0, 0, 0, more)), pad(B, (0, more))) if more else (A, B)


def cut(p: Adapter, key: str, value: Tensor) -> Tensor:
    """A factor without its padding."""
    where = _OF_RANK.get(key)
    if where is not None and value.shape[where] == p.r and p.layer.view.label == "Linear" and "blocks" not in vars(p):
        return value
    axis, blocks = _axis(p, key)
    if axis is None:
        return value
    rank = wanted(p, key, int(p.r))
    if value.shape[axis] <= rank:
        return value
    parts = value.unflatten(axis, (blocks, -1)).narrow(axis + 1, 0, rank // blocks)
    return parts.flatten(axis, axis + 1).contiguous()


def fits(p: Adapter, key: str, shape: tuple[int, ...]) -> bool:
    """Whether a file's tensor is the adapter's own without padding."""
    axis, _ = _axis(p, key)
    if axis is None or len(shape) <= axis:
        return False
    held = next((list(s.tensor.shape) for s in p.layer.slots(p.name) if s.key == key), [])
    return len(held) == len(shape) and [*held[:axis], wanted(p, key, int(p.r)), *held[axis + 1 :]] == list(shape)


def wanted(p: Adapter, key: str, rank: int) -> int:
    """The size of the rank's axis for a rank: that of A for each expert, of B for each expert, but not each block."""
    if key in _BESIDE:
        return rank
    view, base = p.layer.view, p.layer.get_base_layer()
    experts = view.shape(base)[0] if len(view.shape(base)) > 2 else 1
    return rank * experts // (_blocks(p)[1] if _axis(p, key)[0] else 1)


def own(p: Adapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(..., r, I) and (..., O, r) without the padding, which every block has at its end."""
    if A.shape[-2] == p.r:
        return A, B
    n, _ = _blocks(p)
    at = torch.arange(A.shape[-2], device=A.device).unflatten(0, (n, -1))[:, : int(p.r) // n].flatten()
    return A[..., at, :], B[..., at]


def _blocks(p: Adapter) -> tuple[int, int]:
    """Into how many blocks the ranks fall, and how many of them share the columns of B as it is held."""
    groups = p.layer.view.groups(p.layer.get_base_layer())
    side, n = p.__dict__.get("blocked"), p.__dict__.get("blocks", 1)
    n = math.lcm(groups, n) if side else groups
    return n, n if side == "B" else groups


def _axis(p: Adapter, key: str) -> tuple[int | None, int]:
    """(the rank's axis of a tensor, into how many blocks it falls: in A there are some for each expert)."""
    n, shared = _blocks(p)
    if key in _BESIDE:
        return len(p.layer.view.shape(p.layer.get_base_layer())) - 2 + _BESIDE[key], n
    name = key.removesuffix(".weight").removeprefix("lora_").removeprefix("embedding_")
    if name == "B":
        return 1, n // shared
    shape = p.layer.view.shape(p.layer.get_base_layer())
    return (0, n * int(shape[0] if len(shape) > 2 else 1)) if name == "A" else (None, 1)


def widened(p: Adapter, target: int) -> dict[str, Tensor]:
    """The adapter's factors with room for the rank `target`, by key.

    Raises ValueError if the rank is larger already, or `target` cannot be shared out to the groups of a convolution.
    """
    found: dict[str, Tensor] = {}
    for slot in p.layer.slots(p.name):
        axis, _ = _axis(p, slot.key)
        if axis is None:
            continue
        n, _ = _blocks(p)
        if target % n:
            raise ValueError(
                f"target_rank={target} is not a multiple of the {n} groups or blocks of {p.path!r}. "
                f"Use {-(-target // n) * n}."
            )
        if p.r > target:
            raise ValueError(f"The adapter {p.name!r} has rank {p.r} at {p.path!r}, more than target_rank={target}.")
        tensor, shape = slot.tensor.detach(), list(slot.tensor.shape)
        shape[axis] = wanted(p, slot.key, target)
        padding = padded(p, slot.key, tensor, shape)
        found[slot.key] = tensor if padding is None else padding
    return found
