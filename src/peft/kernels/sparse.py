"""Products with a matrix that is zero but for numbers at fixed places, without a dense one.

Letters: n numbers at places of a (k, d) matrix; z is (d, N), features first, so that those of one place lie together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .again import batched, differentiable
from .modes import lasting, node, ordinary


class Bags(NamedTuple):
    """The numbers by the rows of what they make: which are summed there."""

    order: Tensor | None  # of the numbers, (n); None where they stand in order
    rows: Tensor  # of each, in order
    taken: Tensor  # which row of the table each one takes
    offsets: Tensor  # where each row begins, (rows + 1)

    def sorted(self, values: Tensor) -> Tensor:
        """The numbers in order."""
        return values if self.order is None else values.index_select(0, self.order)


class Places:
    """Places of a matrix, in the orders in which products read them; a copy of this holds nothing.

    Arguments:
        source: the tensor that the places follow from.
        rows: (n).
        columns: (n).
        shape: (k, d).
        gains: factors of the numbers, (m, n / m), each of which stands at m places; None for one place and no factor.
    """

    def __init__(
        self,
        source: Tensor | None = None,
        rows: Any = None,
        columns: Any = None,
        shape: tuple[int, int] = (0, 0),
        gains: Tensor | None = None,
    ) -> None:
        self.source, self.version = source, None if source is None else state(source)
        self.rows, self.columns, self.shape, self.gains = rows, columns, shape, gains
        self._made: dict[bool, Bags] = {}
        self._flat: Tensor | None = None

    def of(self, source: Tensor) -> bool:
        """Whether they follow from this tensor, as it is now."""
        return self.source is source and self.version == state(source)

    def flat(self) -> Tensor:
        """Rows and columns in one number."""
        if self._flat is None:
            with ordinary():
                flat = self.rows * self.shape[1] + self.columns
            if not lasting():
                return flat
            self._flat = flat
        return self._flat

    def bags(self, back: bool) -> Bags:
        """By rows, or by columns for the matrix transposed."""
        if back not in self._made:
            with ordinary():
                bags = self._bags(back)
            if not lasting():
                return bags
            self._made[back] = bags
        return self._made[back]

    def _bags(self, back: bool) -> Bags:
        keys, others = (self.columns, self.rows) if back else (self.rows, self.columns)
        ordered = bool((keys[1:] >= keys[:-1]).all())
        order = None if ordered else keys.argsort()
        if order is not None:
            keys, others = keys[order], others[order]
        counts = torch.bincount(keys, minlength=self.shape[back])
        offsets = F.pad(counts.cumsum(0), (1, 0))
        return Bags(order, *(t.to(torch.int32) for t in (keys, others, offsets)))

    def __reduce__(self) -> Any:
        return Places, ()


def places(cache: dict[str, Any], at: Tensor, shape: tuple[int, int]) -> Places:
    """Places given as rows and columns, (2, n), or both in one number, (n), kept in a cache while they stay."""
    found = cache.get("places")
    if found is None or not found.of(at):
        with ordinary():  # they serve training, too
            rows, columns = at.long() if at.dim() == 2 else (at.long() // shape[1], at.long() % shape[1])
        found = Places(at, rows, columns, shape)
        if lasting():
            cache["places"] = found
    return found


def state(t: Tensor) -> tuple[int, int]:
    """What changes with a tensor's numbers or memory."""
    return (-1 if t.is_inference() else t._version), t.data_ptr()


def plain(values: Tensor, z: Tensor, places: Places) -> Tensor:
    """The definition: the matrix times z, (k, N)."""
    taken = z[places.columns] * values[:, None]
    return z.new_zeros(places.shape[0], z.shape[1]).index_add(0, places.rows, taken)


def product(values: Tensor, z: Tensor, places: Places) -> Tensor:
    """`plain` of values (n) and z (d, N) of one dtype, which keeps values and z only; not for transforms and graphs."""
    if torch._C._is_tracing():  # which has no word for a node without tensors among its arguments
        return plain(values, z, places)
    return _product(values, z, places) if torch.is_grad_enabled() else _sums(values, z, places.bags(False))


def linear(x: Tensor, W: Tensor, b: Tensor | None, values: Tensor, places: Places) -> Tensor:
    """W x + b and the product with x (N, d), all of one dtype, (N, k); not for transforms and graphs."""
    if torch.is_grad_enabled() and not (W.requires_grad or torch._C._is_tracing()):
        return _linear(x, W, b, values, places)
    u = product(values, x.mT, places).mT
    return torch.addmm(u if b is None else u + b, x, W.mT)


def scattered(W: Tensor, values: Tensor, places: Places) -> Tensor:
    """W (k, d) and the matrix, in one pass over it beside the copy."""
    return W.reshape(-1).scatter_add(0, places.flat(), values).view_as(W)


def row(y: Tensor, x: Tensor, values: Tensor, places: Places) -> Tensor:
    """y (1, k), which is the caller's own, and the product with x (1, d); no gradients."""
    taken = x.view(-1).index_select(0, places.columns).mul_(values)
    y.view(-1).index_add_(0, places.rows, taken)
    return y


def _sums(values: Tensor, table: Tensor, bags: Bags) -> Tensor:
    weights = bags.sorted(values).contiguous()
    return torch.embedding_bag(table.contiguous(), bags.taken, bags.offsets, False, 0, False, weights, True)[0]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, z: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(values, z)
        ctx.places = places
        return _sums(values, z, places.bags(False))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (values, z), places, needs = ctx.saved_tensors, ctx.places, ctx.needs_input_grad
        if torch.is_grad_enabled() or batched(grad):
            found = differentiable(lambda v, t: plain(v, t, places), (values, z), needs[:2], grad)
            return *found, None
        grad = grad.contiguous()
        of_values = _of_values(grad, z, places) if needs[0] else None
        return of_values, _sums(values, grad, places.bags(True)) if needs[1] else None, None


class _Linear(torch.autograd.Function):
    """The same beside a frozen matrix; the gradient of x is summed in the product with that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, values: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(x, W, b, values)
        ctx.places = places
        u = _sums(values, x.mT, places.bags(False)).mT
        return torch.addmm(u if b is None else u + b, x, W.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x, W, b, values), places, needs = ctx.saved_tensors, ctx.places, ctx.needs_input_grad
        if torch.is_grad_enabled() or batched(grad):

            def form(x: Tensor, b: Tensor | None, values: Tensor) -> Tensor:
                return F.linear(x, W, b) + plain(values, x.mT, places).mT

            of_x, *rest = differentiable(form, (x, b, values), (needs[0], *needs[2:4]), grad)
            return of_x, None, *rest, None
        first = grad.mT.contiguous()
        of_values = _of_values(first, x.mT, places) if needs[3] else None
        of_x = torch.addmm(_sums(values, first, places.bags(True)).mT, grad, W) if needs[0] else None
        return of_x, None, grad.sum(0) if needs[2] else None, of_values, None


def _of_values(grad: Tensor, z: Tensor, places: Places) -> Tensor:
    """The gradient of the numbers, from that of their product with z, (k, N) in order."""
    bags = places.bags(False)
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, z.contiguous(), bags.taken, bags.offsets, bags.rows, 0
    )
    return found if bags.order is None else torch.empty_like(found).index_copy_(0, bags.order, found)


_product, _linear = node(_Product), node(_Linear)
