"""Stacked experts under adapters: a weight whose numbers are computed where they are asked for, and only those.

Modules with fused experts hold W (E, O, I) and multiply each token with the few experts that it is sent to. `Chosen`
stands for W + s B A, with A (E, r, I) and B (E, O, r), and never makes it: choosing an expert chooses its factors, and
a product with it is the product with W plus two thin ones. Whatever else is done to it is done to W', which is then
made once: that is the plain form, and the one under `torch.compile`, `torch.func` and forward-mode differentiation.

Letters: E experts, O out-features, I in-features, r rank, N rows of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUMBERS = (Tensor, nn.Parameter, nn.Buffer)  # what holds its numbers as torch's products expect them


class Term(NamedTuple):
    """An update s B A of a weight (..., O, I)."""

    A: Tensor
    B: Tensor
    s: Any

    def laid(self) -> Term:
        """The same with each expert's numbers beside one another, which files hold apart."""
        return Term(self.A.contiguous(), self.B.mT.contiguous().mT, self.s)


class Chosen(Tensor):
    """(W + sum of s B A), or its transpose; shape, dtype and device are those of W."""

    W: Tensor
    terms: tuple[Term, ...]
    turned: bool
    made: Tensor | None

    @classmethod
    def of(cls, W: Tensor, terms: Sequence[Term], turned: bool = False) -> Chosen:
        """In place of W (..., O, I) under these updates; `turned` gives (..., I, O)."""
        like = W.mT if turned else W
        found: Chosen = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=W.dtype, device=W.device
        )
        found.__dict__.update(W=W, terms=tuple(terms), turned=turned, made=None)
        return found

    def whole(self) -> Tensor:
        """W', made once."""
        if self.made is None:
            W = self.W
            for A, B, s in self.terms:
                if A.dtype in (torch.float16, torch.bfloat16) and not A.is_cuda:
                    A, B = A.float(), B.float()  # half products on the CPU lose accuracy, and time
                W = (W + (B @ A) * s).to(W.dtype)
            self.__dict__["made"] = W.mT if self.turned else W
        return self.made  # type: ignore[return-value]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KEPT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        short = SHORT.get(func) or SHORT.get(getattr(func, "__name__", ""))
        found = NotImplemented if short is None else short(func, *args, **kwargs)
        return func(*_made(args), **_made(kwargs)) if found is NotImplemented else found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What reaches the numbers past Python."""
        if torch.is_grad_enabled() and any(isinstance(a, Chosen) and a.learns() for a in args):
            raise RuntimeError(
                f"{func} reads the weight of experts past Python, where no gradient would reach their adapters. Merge "
                "the adapter, or choose another implementation of the experts."
            )
        return func(*_made(args), **_made(kwargs or {}))

    def learns(self) -> bool:
        """Whether a gradient is wanted."""
        return self.W.requires_grad or any(A.requires_grad or B.requires_grad for A, B, _ in self.terms)


def _made(value: Any) -> Any:
    if isinstance(value, Chosen):
        return value.whole()
    if isinstance(value, (tuple, list)):
        return type(value)(_made(v) for v in value)
    return {k: _made(v) for k, v in value.items()} if isinstance(value, dict) else value


def _rest(m: Any) -> bool:
    """Whether a short form may be taken."""
    return isinstance(m, Chosen) and m.made is None


def _choose(func: Any, m: Any, index: Any) -> Any:
    if isinstance(index, Tensor) and index.dtype in WHOLE and index.dim() < 2:
        index = int(index) if index.dim() == 0 else index
    elif not isinstance(index, (int, slice)) or isinstance(index, bool):
        return NotImplemented
    if not _rest(m) or m.W.dim() != 3:
        return NotImplemented
    return Chosen.of(m.W[index], [Term(A[index], B[index], s) for A, B, s in m.terms], m.turned)


def _turn(func: Any, m: Any, *axes: int, dim0: int = -2, dim1: int = -1) -> Any:
    first, second = axes or (dim0, dim1)
    dims = m.W.dim()
    if not _rest(m) or {first % dims, second % dims} != {dims - 2, dims - 1}:
        return NotImplemented
    return Chosen.of(m.W, m.terms, not m.turned)


def _flat(func: Any, m: Any) -> Any:
    return _turn(func, m) if m.W.dim() == 2 else NotImplemented


def _by_weight(
    y: Tensor, x: Tensor, terms: Sequence[Term], turned: bool, times: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """y = times(x, W, or its transpose if `turned`), which is nobody else's, with the updates of it."""
    for A, B, s in terms:
        first, second = (A.mT, B.mT) if turned else (B, A)
        h = times(x if x.dtype is A.dtype else x.to(A.dtype), first)
        if times is torch.matmul and y.dim() == second.dim() == 2 and y.dtype is h.dtype and type(s) is float:
            y = y.addmm_(h, second, alpha=s)
        else:
            y = (y + times(h, second) * s).to(y.dtype)
    return y


def _linear(func: Any, input: Tensor, weight: Any, bias: Any = None) -> Any:
    if not _rest(weight) or weight.W.dim() != 2 or isinstance(input, Chosen) or isinstance(bias, Chosen):
        return NotImplemented
    y = F.linear(input, weight.W.mT if weight.turned else weight.W, bias)
    return _by_weight(y, input, weight.terms, not weight.turned, torch.matmul)


def _product(func: Any, a: Any, b: Any = None, *, mat2: Any = None, other: Any = None) -> Any:
    """a @ b, in whichever place the weight is."""
    b = next(v for v in (b, mat2, other) if v is not None)
    if _rest(b) and not isinstance(a, Chosen) and a.dim() > 1:
        return _by_weight(torch.matmul(a, b.W.mT if b.turned else b.W), a, b.terms, b.turned, torch.matmul)
    if _rest(a) and not isinstance(b, Chosen) and b.dim() > 1:
        return _left(a, b)
    return NotImplemented


def _left(m: Chosen, x: Tensor) -> Tensor:
    """W' x, (..., O, I) (..., I, n)."""
    y = torch.matmul(m.W.mT if m.turned else m.W, x)
    for A, B, s in m.terms:
        first, second = (B.mT, A.mT) if m.turned else (A, B)
        h = torch.matmul(first, x if x.dtype is A.dtype else x.to(A.dtype))
        if y.dim() == second.dim() == h.dim() == 3 and y.dtype is h.dtype and type(s) is float:
            y = y.baddbmm_(second, h, alpha=s)
        else:
            y = (y + torch.matmul(second, h) * s).to(y.dtype)
    return y


def _grouped(func: Any, input: Tensor, weight: Any, offs: Any = None, **rest: Any) -> Any:
    """Rows of (N, I) by expert, which `offs` tells the ends of."""
    if not _rest(weight) or input.dim() != 2 or offs is None or any(v is not None for v in rest.values()):
        return NotImplemented
    y = func(input, weight.W.mT if weight.turned else weight.W, offs=offs)

    def times(x: Tensor, M: Tensor) -> Tensor:
        if not x.is_cpu:  # where to look at `offs` is to wait; rows and columns of 16 bytes are asked for
            over, wide = (-n % (16 // M.element_size()) for n in M.shape[-2:])
            y = func(F.pad(x, (0, over)), F.pad(M, (0, wide, 0, over)).contiguous(), offs=offs)
            return y[:, : M.shape[-1]]
        start, parts = 0, []
        for e, end in enumerate(offs.tolist()):
            if end > start:
                parts.append(x[start:end] @ M[e])
            start = max(start, end)
        left = x.shape[0] - start  # rows of no expert here
        return torch.cat([*parts, x.new_zeros(left, M.shape[-1])]) if left or not parts else torch.cat(parts)

    return _by_weight(y, input, weight.terms, weight.turned, times)


WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8)  # uint8 chooses as a mask does
KEPT = {
    Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_contiguous,
    Tensor.is_floating_point, Tensor.__len__, torch.is_floating_point, torch.numel,
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
        "is_nested", "is_leaf",
    )),
}  # fmt: skip
SHORT: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _choose,
    Tensor.requires_grad.__get__: lambda func, m: m.learns(),  # type: ignore[attr-defined]
    Tensor.mT.__get__: _turn,  # type: ignore[attr-defined]
    Tensor.T.__get__: _flat,  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.transpose, torch.transpose, torch.swapaxes, Tensor.swapaxes), _turn),
    **dict.fromkeys((Tensor.t, torch.t), _flat),
    **dict.fromkeys((torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm), _product),
    Tensor.mm: _product,
    Tensor.__rmatmul__: lambda func, a, b: _product(func, b, a),
    F.linear: _linear,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),  # of torch, and transformers'
}
