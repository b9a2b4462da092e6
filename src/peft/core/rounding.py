"""Merging into a quantised weight: what is stored for W', and how far that is from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import LossyMergeWarning, nearest, report
from .draw import normal
from .storage import Packed, Payload, Storage, of, parameters

MODES = ("requantize", "dequantize", "compensated")
ROUNDS, DIRECTIONS = 40, 64  # of the compensation: passes over the weight, and directions of the update it keeps
STEP, SHRINK, LEAST = 4.0, 0.85, 0.1  # its first step, what each is of the last, and the least direction that counts
LOSSY = 0.1  # the share of an update that may be lost before a merge warns of it
CURES = (
    'quantized="dequantize"',
    'quantized="compensated", which rounds so that the effect of the update stays, or with quantized="dequantize"',
)
NOISY = 0.3  # what plain rounding may add, as a share of the update's size, before a merge warns of it


class MergeError(NamedTuple):
    """What storing W' changed in one layer.

    Attributes:
        mode: "requantize", "dequantize" or "compensated".
        relative: |stored - W'| / |W'|, Frobenius norms.
        lost: 1 - <stored - W, W' - W> / |W' - W|^2: the share of the update that is not there any more; 0 is none.
        noise: |stored - W'| / |W' - W|: the size of all that rounding changed, beside that of the update.
    """

    mode: str
    relative: float
    lost: float
    noise: float = 0.0


def check_mode(mode: str) -> None:
    """Raise ValueError for a mode that does not exist."""
    if mode not in MODES:
        raise ValueError(f"quantized must be one of {list(MODES)}, got {mode!r}.{nearest(str(mode), MODES)}")


def measured(mode: str, stored: Tensor, wanted: Tensor, before: Tensor) -> MergeError:
    """How far what is stored is from what was wanted; all of one shape."""
    error, update = (stored - wanted).float(), (wanted - before).float()
    size = float(update.square().sum())
    kept = float(((stored - before).float() * update).sum())
    off = float(torch.linalg.vector_norm(error))
    relative = off / max(float(torch.linalg.vector_norm(wanted.float())), 1e-30)
    return MergeError(mode, relative, *((1 - kept / size, off / size**0.5) if size else (0.0, 0.0)))


def compensate(
    wanted: Tensor, before: Tensor, rounded: Callable[[Tensor], Tensor], seen: Tensor | None = None
) -> Tensor:
    """Numbers that round to a weight which treats the directions of the update as W' does, (..., O, I).

    Of all weights that can be stored this looks for the nearest to W' with (Q - W') V = 0, V being the directions of
    the input that the update W' - W reads, and those along which inputs are known to lie. The multiplier M of that
    condition is found by dual ascent: Q is what W' + M V' rounds to, which solves the problem for that M, and M grows
    by what the condition lacks. Plain rounding forgets an update that is smaller than its steps; here the missing part
    is added up until it is not. Steps start long, as nothing changes before M V' reaches the steps of the storage, and
    shrink, as Q is not continuous in M.

    Arguments:
        wanted, before: W' and W.
        rounded: numbers -> the nearest that can be stored.
        seen: (I, k), directions that the layer's inputs lie along, for a weight (O, I); None: not known.
    """
    W, D = wanted.float(), (wanted - before).float()
    V, weight = _conditions(D, seen)
    M = torch.zeros(*W.shape[:-1], V.shape[-1], dtype=V.dtype, device=V.device)
    best, least, step = W, float("inf"), STEP
    for _ in range(ROUNDS):
        target = W + M @ V.mT
        error = W - rounded(target.to(wanted.dtype)).float()
        lacking = error @ V
        bad = float(error.square().sum()) + weight * float(lacking.square().sum())
        if bad < least:
            best, least = target, bad
        M, step = M + step * lacking, step * SHRINK
    return best.to(wanted.dtype)


def _strongest(D: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values (..., count) of D and their right vectors (..., I, count); nothing global is drawn.

    By subspace iteration from a random start (Halko, Martinsson, Tropp 2011, algorithm 4.4).
    """
    start = normal((D.shape[-1], count), torch.Generator().manual_seed(0)).to(D)
    Q, _ = torch.linalg.qr(D @ start)
    for _ in range(4):
        Q, _ = torch.linalg.qr(D @ torch.linalg.qr(D.mT @ Q)[0])
    _, size, V = torch.linalg.svd(Q.mT @ D, full_matrices=False)
    return size, V.mT


def _conditions(D: Tensor, seen: Tensor | None) -> tuple[Tensor, float]:
    """The directions of the input (..., I, k) that an update D reads, and how much each counts against the rest."""
    size, V = _strongest(D, min(DIRECTIONS, *D.shape[-2:]))
    counts = size > LEAST * size[..., :1]  # a direction that is hardly read is no condition
    V, count = V * counts.to(V.dtype)[..., None, :], int(counts.sum(-1).max())
    if seen is not None:
        V, _ = torch.linalg.qr(torch.cat([V[:, counts], seen.to(V)], 1))
        count = V.shape[1]
    return V, D.shape[-1] / max(1, count)


def told(layers: Iterable[Any]) -> dict[str, MergeError]:
    """What the last merge has changed by rounding, by the path of each layer that it concerned.

    Warns (`LossyMergeWarning`) if a noticeable part of the update was lost.
    """
    found = {layer._where(): layer.merge_error for layer in layers if layer.merge_error is not None}
    plain = {path: error.noise for path, error in found.items() if error.mode == "requantize"}
    lost = {path: error.lost for path, error in found.items() if error.mode != "dequantize"}
    for shares, limit, what, why in (
        (lost, LOSSY, "has lost {} of the update", "updates smaller than the steps of a storage vanish"),
        (plain, NOISY, "adds an error of {} of the update's size", "the steps of the storage are coarse beside it"),
    ):
        if shares and (mean := sum(shares.values()) / len(shares)) > limit:
            worst = max(shares, key=shares.__getitem__)
            text = (
                f"Rounding to the quantised form {what.format(f'{mean:.0%}')} on average over {len(shares)} layers, "
                f"most at {worst!r} ({shares[worst]:.0%}): {why}. Merge with {CURES[bool(plain)]}, or keep the adapter "
                "unmerged."
            )
            report(LossyMergeWarning, text, strict=False, stacklevel=4)
            break
    return found


def dense_dtype(modules: Iterable[nn.Module]) -> torch.dtype | None:
    """The dtype of the numbers that run through a model's own modules: that of their first dense weight."""
    for module in modules:
        for name, _ in parameters(module):  # without the scales of a quantised weight
            p = module._parameters.get(name)
            if p is not None and p.is_floating_point() and not of(module, name).packed:
                return p.dtype
    return None


def store(layer: Any, kind: Storage, mode: str, W: Tensor, before: Tensor) -> MergeError:
    """Have a layer's base hold W', (..., O, I), in the storage's own form.

    Arguments:
        layer: the tuner layer.
        kind: the storage of its weight.
        mode: "requantize" or "compensated".
        W, before: W', and W without any adapter.
    """
    base, view = layer.get_base_layer(), layer.view
    if mode == "compensated" and isinstance(kind, Packed):
        raw, old = view.raw(base, W), kind.take(base, view.name)
        tried = [old, kind.pack(raw, old)]  # the scales as they are, which fit small updates, and new ones
        errors = [float((kind.unpack(kind.repack(raw, p)) - raw).float().square().sum()) for p in tried]
        scales = tried[errors.index(min(errors))]
        numbers = compensate(W, before, partial(_read, layer, kind, scales), layer.seen)
        kind.put(base, view.name, kind.repack(view.raw(base, numbers), scales))
    else:
        kind.write(base, view.name, view.raw(base, W))
    return measured(mode, view.read(base), W, before)


def _read(layer: Any, kind: Packed, scales: Payload, W: Tensor) -> Tensor:
    """W as it is read again when it was stored with these scales."""
    base, view = layer.get_base_layer(), layer.view
    return cast(Tensor, view.matrix(base, kind.unpack(kind.repack(view.raw(base, W), scales))))


def dense_twin(label: str, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """An ordinary module with a weight of numbers, for a quantised one.

    Arguments:
        label: the layout, as views name it.
        base: the quantised module.
        weight: in the layout's stored form.
        bias: (O,), or None.

    Raises NotImplementedError for a layout that has no such module.
    """
    made: nn.Module
    rows, columns = weight.shape[:2]
    if label == "Linear":
        made = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    elif label == "Embedding":
        made = nn.Embedding(rows, columns, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, device="meta")
    else:
        raise NotImplementedError(f"{type(base).__name__} ({label}) has no dense form. Merge in another way.")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return made.train(base.training)
