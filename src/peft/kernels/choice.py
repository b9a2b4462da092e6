"""Which form of a kernel runs: torch's, or Triton's where the tensors are on a GPU. The only place that decides it.

Each function here gives what the torch form of the same name gives, or None where that one must run. Callers look
first whether there are any `devices`, and where torch is built for CPUs alone there are none. Triton is imported at the
first use on a GPU; where it is missing, does not compile, or gives other numbers than torch (`triton.probe`), the torch
forms run.

The environment variable PEFT_KERNELS, read at the first import, says `torch` to leave Triton out, or `auto`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .modes import NARROW, PLAIN, is_autocast, transformed

SETTINGS = ("auto", "torch")
KINDS = (torch.float32, *NARROW)
WIDEST = 128  # the largest rank that one block holds
FEW = 16  # tokens of a decoding step, for which one launch does all


def _devices() -> frozenset[str]:
    setting = os.environ.get("PEFT_KERNELS") or "auto"
    if setting not in SETTINGS:
        raise ValueError(f"PEFT_KERNELS is {setting!r}, but must be one of {', '.join(SETTINGS)}. Unset it for 'auto'.")
    built = {"cuda": torch.backends.cuda.is_built(), "xpu": torch.xpu._is_compiled()}
    return frozenset(kind for kind in built if built[kind] and setting == "auto")


devices = _devices()
reasons: dict[Any, str] = {}  # why a form is not used: (form, device, rank, dtypes) -> words
_known: dict[Any, Any] = {}


def forms(form: str, x: Tensor, A: Tensor, *others: Tensor | None) -> Any:
    """The module with the Triton forms, if this one is right for such tensors; else None.

    Arguments:
        form: a key of `triton.probe.TRIED`.
        x: activations, (..., d).
        A: a factor, (r, d), or some below one another.
        others: every other tensor that a kernel reads.
    """
    if is_autocast(x) or transformed() or not all(map(_plain, (x, A, *others))):
        return None
    return _tried(form, x, A)


def _plain(t: Tensor | None) -> bool:
    return t is None or (type(t) in PLAIN and t.dtype in KINDS and t.is_contiguous())


def _tried(form: str, x: Tensor, A: Tensor, rank: int | None = None) -> Any:
    rank = A.shape[0] if rank is None else rank
    if not 0 < rank <= WIDEST or not x.numel() or x.device.type not in devices:
        return None
    key = (
        form,
        x.device,
        max(16, 1 << (rank - 1).bit_length()),
        x.dtype,
        A.dtype,
        torch.get_float32_matmul_precision(),
    )
    if key not in _known:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # a trial waits for the device, which no graph can hold
        _known[key] = _opened(key, form, x, A, rank)
    return _known[key]


def _opened(key: Any, form: str, x: Tensor, A: Tensor, rank: int) -> Any:
    try:
        from .triton import probe
        from .triton.language import found

        if not found:
            reasons[key] = "Triton is not installed, or cannot be imported"
        elif probe.right(form, x.device, rank, x.dtype, A.dtype):
            return probe
        else:
            reasons[key] = "its numbers are not torch's"
    except Exception as error:  # a compiler, a driver, a device that is too small: torch's forms work everywhere
        reasons[key] = f"{type(error).__name__}: {error}"
    return None


def _learn(*tensors: Tensor) -> bool:
    """Whether all of them do, where gradients are computed."""
    return torch.is_grad_enabled() and all(t.requires_grad for t in tensors)


def linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Any, rate: float) -> Tensor | None:
    """`lowrank.linear`: training with dropout, and a few tokens without gradients."""
    if type(scale) is not float or W.dtype is not x.dtype:
        return None
    if rate and _learn(A, B) and not W.requires_grad and (found := forms("thin", x, A, B, W)):
        return found.update.linear(x, W, b, A, B, scale, rate)
    small = not rate and not torch.is_grad_enabled() and x.numel() <= FEW * x.shape[-1]
    if small and (found := forms("few", x, A, B)):
        return found.update.decode(x, W, b, A, B, scale)
    return None


def add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, rate: float) -> Tensor | None:
    """`lowrank.add`: training with dropout."""
    if type(scale) is float and rate and _learn(A, B) and (found := forms("thin", x, A, B, y)):
        return found.update.add(y, x, A, B, scale, rate)
    return None


def add_scaled(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, rate: float, m: Tensor, n: Tensor, b: Tensor | None
) -> Tensor | None:
    """`scaled.add`: training."""
    if type(scale) is float and _learn(A, B) and (found := forms("gain", x, A, B, y, m, n, b)):
        return found.gained.add(y, x, A, B, scale, rate, m, n, b)
    return None


def linear_scaled(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Any, rate: float, m: Tensor, n: Tensor
) -> Tensor | None:
    """`scaled.linear`: training."""
    if type(scale) is float and _learn(A, B) and (found := forms("gain", x, A, B, W, m, n, b)):
        return found.gained.add(F.linear(x, W, b), x, A, B, scale, rate, m, n, b)
    return None


def norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, scale: Any) -> Tensor | None:
    """`scaled.norms`, of one matrix."""
    if type(scale) is float and W.dim() == 2 and not torch.is_grad_enabled():
        found = forms("norms", W, A, squares, B)
        return found and found.gained.norms(W, squares, A, B, scale)
    return None


def banked(A: Tensor, B: Tensor) -> bool:
    """Whether an adapter's factors may stand in a bank of all ranks."""
    ready = A.dtype in KINDS and B.dtype is A.dtype and not transformed()
    return ready and _tried("bank", A, A) is not None


def bank(terms: Sequence[tuple[str, tuple[Tensor, Tensor, Any]]]) -> Any:
    """The bank of adapters that are all `banked`."""
    from .triton.bank import Ragged

    return Ragged(terms, partial(_bankable, max(A.shape[0] for _, (A, _, _) in terms)))


def _bankable(rank: int, x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether a bank whose largest rank this is may be used on such tensors now."""
    kinds = not (is_autocast(x) or transformed()) and all(map(_plain, (x, y, A, B)))
    return kinds and _tried("bank", x, A, rank) is not None
