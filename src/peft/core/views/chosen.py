"""Stacked experts under adapters: a weight whose numbers are computed where they are asked for, and only those.

Modules with fused experts hold W (E, O, I) and multiply each token with the few experts that it is sent to. `Chosen`
stands for g W + s B A, with A (E, r, I), B (E, O, r) and a gain g (E, O) of DoRA's, and never makes it: choosing an
expert chooses its factors, and a product with it is the product with W plus two thin ones. Whatever else is done to it
is done to W', which is then made once: that is the plain form, and the one under `torch.compile`, `torch.func` and
forward-mode differentiation.

Dropout is of what an update is multiplied with: each token, at each of the experts that it is sent to, loses features
of its own, and W sees it whole. Where no product is seen, but W' made, all tokens lose the same features.

Letters: E experts, O out-features, I in-features, r rank, N rows of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import masks
from ...kernels.modes import NARROW, changed


def product(A: Tensor, B: Tensor, s: Any) -> Tensor:
    """s B A."""
    if A.dtype in NARROW and not A.is_cuda:
        A, B = A.float(), B.float()  # half products on the CPU lose accuracy, and time
    return (B @ A) * s


class Term(NamedTuple):
    """An update s B A of a weight (..., O, I), or s A where B is None, of which the input is dropped at a rate."""

    A: Tensor
    B: Tensor | None
    s: Any
    rate: float = 0.0
    g: Tensor | None = None  # (..., O), what the weight before it is multiplied with
    each: tuple[Term, ...] = ()  # those of the experts by themselves, where they are kept
    rows: tuple[Tensor, ...] = ()  # `thin(True)`, likewise

    def laid(self) -> Term:
        """The same with each expert's numbers beside one another, which files hold apart, and cut into experts."""
        A, B = self.A.contiguous(), None if self.B is None else self.B.mT.contiguous().mT
        if B is None or A.dim() != 3:
            return self._replace(A=A, B=B)
        cut = zip(A, B, A.mT, B.mT, strict=True)
        return self._replace(A=A, B=B, each=tuple(Term(a, b, self.s, rows=(at, bt)) for a, b, at, bt in cut))

    def chosen(self, index: int | slice | Tensor) -> Term:
        """That of some experts."""
        if self.each and type(index) is int:
            return self.each[index]
        return Term(self.A[index], None if self.B is None else self.B[index], self.s, self.rate)

    def scaled(self, g: Tensor) -> Term:
        """The same with its out-features multiplied."""
        A, B = (self.A * g[..., None], None) if self.B is None else (self.A, self.B * g[..., None])
        return Term(A, B, self.s, self.rate, self.g)

    def dense(self, drop: bool = True) -> Tensor:
        """s B A, of which dropout, if it is asked for, takes the same features from whatever it is multiplied with."""
        A, B = thinned(self.A, self.rate if drop else 0.0), self.B
        if B is None:
            return A * self.s
        return product(A, B, self.s)

    def thin(self, turned: bool) -> tuple[Tensor, ...]:
        """The matrices that rows are multiplied with in turn: of the transpose if `turned`."""
        if turned and self.rows:
            return self.rows
        if self.B is None:
            return (self.A.mT if turned else self.A,)
        return (self.A.mT, self.B.mT) if turned else (self.B, self.A)


def thinned(D: Tensor, rate: float) -> Tensor:
    """(..., O, I) without the features that dropout takes, those of each expert its own."""
    return D * masks.dropout(torch.ones_like(D[..., :1, :]), rate) if rate else D


def composed(terms: Sequence[Term]) -> tuple[Tensor | None, Sequence[Term]]:
    """(g, terms without any g), for updates of which each multiplies what those before it have made."""
    if not any(term.g is not None for term in terms):
        return None, terms
    gain, found = None, list[Term]()
    for term in terms:
        if term.g is not None:
            gain = term.g if gain is None else gain * term.g
            found = [t.scaled(term.g) for t in found]
        found.append(term if term.g is None else term._replace(g=None))
    return gain, found


class Chosen(Tensor):
    """(g W + sum of s B A), or its transpose; shape, dtype and device are those of W."""

    W: Tensor
    terms: Sequence[Term]
    turned: bool
    gain: Tensor | None
    made: Tensor | None

    @classmethod
    def of(cls, W: Tensor, terms: Sequence[Term], turned: bool = False, gain: Tensor | None = None) -> Chosen:
        """In place of W (..., O, I) under a gain (..., O) and these updates; `turned` gives (..., I, O)."""
        like = W.mT if turned else W
        found: Chosen = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=W.dtype, device=W.device
        )
        found.__dict__.update(W=W, terms=terms, turned=turned, gain=gain, made=None)
        return found

    def whole(self) -> Tensor:
        """W', made once."""
        if self.made is None:
            W = self.gained()
            for term in self.terms:
                W = (W + term.dense()).to(W.dtype)
            self.__dict__["made"] = W.mT if self.turned else W
        return self.made  # type: ignore[return-value]

    def gained(self) -> Tensor:
        """g W."""
        return self.W if self.gain is None else (self.W * self.gain[..., None]).to(self.W.dtype)

    @property
    def drops(self) -> bool:
        """Whether what it is multiplied with matters to its updates."""
        return any(term.rate for term in self.terms)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, short = kwargs or {}, SHORT.get(func)
        if short is None and func in KEPT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        short = short or SHORT.get(getattr(func, "__name__", ""))
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
        held = [self.W, self.gain, *(t for term in self.terms for t in term[:2])]
        return any(t is not None and t.requires_grad for t in held)


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
    if isinstance(index, Tensor) and index.dtype in WHOLE and (dims := index.dim()) < 2:
        index = index if dims else int(index)
    elif not isinstance(index, (int, slice)) or isinstance(index, bool):
        return NotImplemented
    if not _rest(m) or m.W.dim() != 3:
        return NotImplemented
    gain = None if m.gain is None else m.gain[index]
    return Chosen.of(m.W[index], [term.chosen(index) for term in m.terms], m.turned, gain)


def _turn(func: Any, m: Any, *axes: int, dim0: int = -2, dim1: int = -1) -> Any:
    first, second = axes or (dim0, dim1)
    dims = m.W.dim()
    if not _rest(m) or {first % dims, second % dims} != {dims - 2, dims - 1}:
        return NotImplemented
    return Chosen.of(m.W, m.terms, not m.turned, m.gain)


def _flat(func: Any, m: Any) -> Any:
    return _turn(func, m) if m.W.dim() == 2 else NotImplemented


Times = Callable[[Tensor, Tensor], Tensor]


def _along(g: Tensor) -> Tensor:
    """A gain (..., O) beside rows (..., N, O)."""
    return g if g.dim() == 1 else g.unsqueeze(-2)


def _by_weight(
    m: Chosen, x: Tensor, turned: bool, base: Times, times: Times = torch.matmul, along: Any = _along
) -> Tensor:
    """x W', or that with the transpose of it if `turned`.

    Arguments:
        m: the weight.
        x: the rows.
        turned: which of the two.
        base: the product with W, or its transpose, whose result is nobody else's.
        times: the product with factors.
        along: lays a gain beside rows.
    """
    if m.gain is None:
        y = base(x, m.W.mT if turned else m.W)
    else:
        g = along(m.gain)
        y = (base(x, m.W.mT) * g).to(x.dtype) if turned else base((x * g).to(x.dtype), m.W)
    return _updated(y, x, m.terms, turned, times)


def _updated(y: Tensor, x: Tensor, terms: Sequence[Term], turned: bool, times: Times = torch.matmul) -> Tensor:
    """y, which is nobody else's, with what updates add to the product with x."""
    for term in terms:
        s, thin = term.s, term.thin(turned)
        h = x if x.dtype is term.A.dtype else x.to(term.A.dtype)
        h = masks.dropout(h, term.rate) if term.rate else h
        for factor in thin[:-1]:
            h = times(h, factor)
        last = thin[-1]
        if (
            times is torch.matmul
            and y.dim() == last.dim() == 2
            and y.dtype is h.dtype is last.dtype
            and type(s) is float
        ):
            y = changed(y, "addmm", h, last, alpha=s)
        else:
            y = (y + times(h, last) * s).to(y.dtype)
    return y


def _linear(func: Any, input: Tensor, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not Chosen or weight.made is not None or weight.W.dim() != 2:
        return NotImplemented
    if type(input) is Chosen or type(bias) is Chosen:
        return NotImplemented
    if weight.gain is None and not weight.turned:
        return _updated(F.linear(input, weight.W, bias), input, weight.terms, True)
    at_once = bias if weight.gain is None else None
    y = _by_weight(weight, input, not weight.turned, lambda x, W: F.linear(x, W.mT, at_once))
    return y if bias is at_once else y + bias


def _product(func: Any, a: Any, b: Any = None, *, mat2: Any = None, other: Any = None) -> Any:
    """a @ b, in whichever place the weight is."""
    b = next(v for v in (b, mat2, other) if v is not None)
    if _rest(b) and not isinstance(a, Chosen) and a.dim() > 1:
        return _by_weight(b, a, b.turned, torch.matmul)
    if _rest(a) and not isinstance(b, Chosen) and b.dim() > 1:
        return _left(a, b)
    return NotImplemented


def _left(m: Chosen, x: Tensor) -> Tensor:
    """W' x, (..., O, I) (..., I, n)."""
    alike = m.W.dim() == x.dim() == 3 and m.W.shape[0] == x.shape[0]
    product = torch.bmm if alike else torch.matmul
    if m.gain is None:
        y = product(m.W.mT if m.turned else m.W, x)
    else:
        g = m.gain[..., None]
        y = product(m.W.mT, (x * g).to(x.dtype)) if m.turned else (product(m.W, x) * g).to(x.dtype)
    for term in m.terms:
        s, thin = term.s, term.thin(not m.turned)  # the transposes of these, W' x = (x' W'')'
        h = x if x.dtype is term.A.dtype else x.to(term.A.dtype)
        h = masks.dropout(h, term.rate) if term.rate else h
        for factor in thin[:-1]:
            h = product(factor.mT, h)
        last = thin[-1].mT
        if y.dim() == last.dim() == h.dim() == 3 and y.dtype is h.dtype is last.dtype and type(s) is float:
            y = y.baddbmm_(last, h, alpha=s)
        else:
            y = (y + product(last, h) * s).to(y.dtype)
    return y


def _einsum(func: Any, equation: Any, *operands: Any) -> Any:
    """A product with one other tensor, where that is dropped for the updates; else W' does."""
    given = operands[0] if len(operands) == 1 else operands
    weights = [m for m in given if _rest(m)]
    if not isinstance(equation, str) or len(given) != 2 or len(weights) != 1 or not weights[0].drops:
        return NotImplemented
    m: Chosen = weights[0]

    def product(W: Tensor, x_or: Callable[[Tensor], Tensor]) -> Tensor:
        W = W.mT if m.turned else W
        return func(equation, *(W if operand is m else x_or(operand) for operand in given))

    y = product(m.gained(), lambda x: x)
    for term in m.terms:
        D, rate = term.dense(drop=False), term.rate
        y = (y + product(D, lambda x, r=rate, D=D: masks.dropout(x.to(D.dtype), r))).to(y.dtype)  # type: ignore[misc]
    return y


def _grouped(func: Any, input: Tensor, weight: Any, offs: Any = None, **rest: Any) -> Any:
    """Rows of (N, I) by expert, which `offs` tells the ends of."""
    if not _rest(weight) or input.dim() != 2 or offs is None or any(v is not None for v in rest.values()):
        return NotImplemented

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

    def along(g: Tensor) -> Tensor:
        rows = torch.arange(input.shape[0], dtype=offs.dtype, device=offs.device)
        return g[torch.searchsorted(offs, rows, right=True).clamp(max=len(g) - 1)]

    base = lambda x, W: func(x, W, offs=offs)  # noqa: E731
    return _by_weight(weight, input, weight.turned, base, times, along)


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
    torch.einsum: _einsum,
    Tensor.__rmatmul__: lambda func, a, b: _product(func, b, a),
    F.linear: _linear,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),  # of torch, and transformers'
}
