"""Whether the tensors of one target are a whole update: all of them there, of kinds and sizes that go together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..errors import listing
from .part import LORA, MAGNITUDE, ConversionError

Tensors = Mapping[str, Tensor]
MID = "mid"  # a kernel between two factors, as some files have it


def check(tensors: Tensors, method: str, name: str) -> None:
    """Raise ConversionError for tensors that are no update of a method.

    Arguments:
        tensors: by their names in PEFT's files.
        method: LORA, LOHA or LOKR.
        name: of the target, for messages.
    """
    strange = [k for k, t in tensors.items() if not t.is_floating_point() or not t.numel()]
    if strange:
        kinds = {k: f"{tensors[k].dtype} {tuple(tensors[k].shape)}" for k in strange}
        raise ConversionError(f"{name!r} has {kinds}, where numbers with a fraction are expected.")
    fault = {"LORA": _lora, "LOHA": _loha, "LOKR": _lokr}[method](tensors)
    if fault:
        sizes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in tensors.items())
        raise ConversionError(f"The tensors of {name!r} are no whole update: {fault} ({sizes}). Is the file damaged?")


def _lora(t: Tensors) -> str:
    pairs = [(t.get(a), t.get(b)) for a, b in ((LORA[0], LORA[1]), (LORA[3], LORA[4]))]
    A, B = next((p for p in pairs if None not in p), (None, None))
    if A is None or B is None:
        return f"it has {listing(t)} of two factors"
    if min(A.dim(), B.dim()) < 2:
        return "a factor has less than two axes"
    m = next((t[k] for k in MAGNITUDE if k in t), None)
    mid, bias = t.get(MID), t.get("lora_B.bias")
    faults = {
        "the factors have different axes": A.dim() != B.dim() or A.dim() > 5,
        "the ranks do not fit": A.dim() == 2 and A.shape[0] != B.shape[-1],
        "the rank is no multiple of the groups": A.shape[0] % B.shape[1] != 0,
        "B has a kernel": B.dim() > 2 and B[0, 0].numel() != 1,
        "the bias is not of B's size": bias is not None and tuple(bias.shape) != tuple(B.shape[:1]),
        "the norms are not of B's size": m is not None and m.numel() % B.shape[0] != 0,
        "the kernel does not fit": mid is not None and not _is_kernel(mid, A, B),
    }
    return next((text for text, wrong in faults.items() if wrong), "")


def _is_kernel(mid: Tensor, A: Tensor, B: Tensor) -> bool:
    r = A.shape[0]
    return mid.dim() > 2 and mid.dim() == A.dim() and tuple(mid.shape[:2]) == (r, r) and A[0, 0].numel() == 1


def _loha(t: Tensors) -> str:
    lacking = [f"hada_w{n}_{s}" for n in "12" for s in "ab" if f"hada_w{n}_{s}" not in t]
    if lacking or ("hada_t1" in t) != ("hada_t2" in t):
        return f"it lacks {listing(lacking or ['one core'])}"
    sizes = [_product(t[f"hada_w{n}_a"], t[f"hada_w{n}_b"], t.get(f"hada_t{n}")) for n in "12"]
    return "" if sizes[0] is not None and sizes[0] == sizes[1] else "the factors do not fit"


def _product(a: Tensor, b: Tensor, core: Tensor | None = None) -> tuple[int, ...] | None:
    """(O, I, kernel) of a product, with a core between that has the kernel; None for factors that do not fit."""
    if a.dim() != 2 or b.dim() != 2:
        return None
    if core is None:
        return (a.shape[0], b.shape[1], 1) if a.shape[1] == b.shape[0] else None
    if core.dim() < 3 or tuple(core.shape[:2]) != (a.shape[0], b.shape[0]):
        return None
    return (a.shape[1], b.shape[1], math.prod(core.shape[2:]))


def _lokr(t: Tensors) -> str:
    for n in "12":
        whole, factors = f"lokr_w{n}", [f"lokr_w{n}_a", f"lokr_w{n}_b"]
        if (whole in t) == any(f in t for f in factors) or (whole not in t and not all(f in t for f in factors)):
            return f"it has neither {whole} alone nor both of its factors alone"
        core = t.get("lokr_t2") if n == "2" else None
        if whole in t and (t[whole].dim() < 2 or core is not None or (n == "1" and t[whole].dim() != 2)):
            return f"{whole} is no matrix"
        if whole not in t and _product(t[factors[0]], t[factors[1]], core) is None:
            return f"the factors of {whole} do not fit"
    return ""
