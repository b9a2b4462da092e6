"""Between what a process holds and the mesh that a layer's weight is spread over: inputs go in, outputs come out.

Letters: O out-features, I in-features. A module of tensor parallelism takes and gives plain tensors, this process's
part of them or the whole; which of both is told by their sizes, for inputs against the part of W that lies here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .gather import full, is_lent, is_mesh

Placements = tuple[Any, ...]


def replicated(mesh: Any) -> Placements:
    """What lies whole on every process."""
    from torch.distributed.tensor import Replicate

    return (Replicate(),) * mesh.ndim


def sharded_by(placement: Any, axis: int, ndim: int) -> bool:
    """Whether a placement splits an axis of a tensor of so many."""
    return hasattr(placement, "dim") and placement.dim % ndim == axis % ndim


def moved(placement: Any, axis: int) -> Any:
    """The same way of splitting, of another axis."""
    if hasattr(placement, "split_factor"):
        return type(placement)(axis, split_factor=placement.split_factor)
    return type(placement)(axis)


def whole_of(part: Tensor, mesh: Any, placements: Placements, shape: tuple[int, ...]) -> Tensor:
    """The DTensor of a whole shape of which this process holds a part; differentiable."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, dtype=torch.uint8, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def heads_of(projection: nn.Module) -> tuple[Any, tuple[bool, ...]] | None:
    """(mesh, along which of its axes) attention heads are split, as the layer that makes them is; None if they are not.

    Arguments:
        projection: the linear layer of keys, or of queries, keys and values.
    """
    weight = projection._parameters.get("weight")
    if not is_mesh(weight) or is_lent(projection, "weight"):
        return None
    split = tuple(sharded_by(p, 0, 2) for p in weight.placements)  # type: ignore[union-attr]
    return (weight.device_mesh, split) if any(split) else None  # type: ignore[union-attr]


def part_of_heads(whole: Tensor, axis: int, projection: nn.Module) -> Tensor:
    """This process's heads of a tensor that all processes have whole; each of them gets the whole gradient."""
    from torch.distributed.tensor import DTensor, Shard

    if (found := heads_of(projection)) is None:
        return whole
    mesh, split = found
    rest = replicated(mesh)
    wanted = [Shard(axis) if s else r for s, r in zip(split, rest, strict=True)]
    given = DTensor.from_local(whole, mesh, rest, run_check=False)
    return given.redistribute(placements=wanted).to_local()


def for_all_heads(tensor: Tensor, projection: nn.Module) -> Tensor:
    """A tensor that works on this process's heads alone; each process gets the gradient from all heads."""
    from torch.distributed.tensor import DTensor, Partial

    if (found := heads_of(projection)) is None:
        return tensor
    mesh, split = found
    rest = replicated(mesh)
    summed = [Partial() if s else r for s, r in zip(split, rest, strict=True)]
    return DTensor.from_local(tensor, mesh, rest, run_check=False).to_local(grad_placements=summed)


class Edge:
    """Where one layer with a spread weight takes its inputs and gives its outputs."""

    def __init__(self, view: Any, module: nn.Module, weight: Any):
        self.view, self.module, self.weight, self.mesh = view, module, weight, weight.device_mesh
        self.axis = 1 if view.kernel(module) else -1  # of the features, in inputs and outputs
        self.out_axis = view.out_axis(module)
        last = {weight.ndim - 1, weight.ndim - 2} if weight.ndim != 2 and not view.kernel(module) else {0, 1}
        self.in_axis = (last - {self.out_axis}).pop()

    def placements(self, role: str) -> Placements:
        """How an adapter's tensor is spread that counts in-features ("in", axis 1) or out-features ("out", axis 0)."""
        mine, axis = (self.in_axis, 1) if role == "in" else (self.out_axis, 0)
        rest, ndim = replicated(self.mesh), self.weight.ndim
        if not role:
            return rest
        pairs = zip(self.weight.placements, rest, strict=True)
        return tuple(moved(p, axis) if sharded_by(p, mine, ndim) else r for p, r in pairs)

    def enter(self, x: Tensor) -> Tensor:
        """The input as a DTensor."""
        if is_mesh(x):
            return x
        whole, part = (t.shape[self.in_axis] for t in (self.weight, self.weight.to_local()))
        split = not self.view.one_hot and x.shape[self.axis] == part != whole
        return self._entered(x, self.in_axis, whole if split else None)

    def found(self, y: Tensor) -> Tensor:
        """What the module gave, as a DTensor."""
        if is_mesh(y):
            return y
        whole = self.view.shape(self.module)[-2]
        return self._entered(y, self.out_axis, None if y.shape[self.axis] == whole else whole)

    def _entered(self, t: Tensor, counted_by: int, features: int | None) -> Tensor:
        """A tensor as a DTensor: whole, or a part of so many features, split as the weight's axis that counts them."""
        wanted, shape = list(replicated(self.mesh)), list(t.shape)
        if features is not None:
            shape[self.axis] = features
            for i, p in enumerate(self.weight.placements):
                if sharded_by(p, counted_by, self.weight.ndim):
                    wanted[i] = moved(p, self.axis % t.dim())
        return whole_of(t, self.mesh, tuple(wanted), tuple(shape))

    def part(self, value: Tensor, placements: Placements | None) -> Tensor:
        """A value that is whole here, or a DTensor, placed otherwise; as it is if None. Differentiable."""
        given = value if is_mesh(value) else whole_of(value, self.mesh, replicated(self.mesh), tuple(value.shape))
        if placements is None or tuple(placements) == tuple(given.placements):  # type: ignore[attr-defined]
            return given
        return given.redistribute(placements=placements)  # type: ignore[attr-defined]


class Apart:
    """A view whose adapters run apart from the module, so that what they bring together should be narrow."""

    dense = False  # no fused form: A x is asked of the stack

    def __init__(self, view: Any):
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


class Seen(Apart):
    """A view that shows a spread weight whole."""

    @property
    def dense(self) -> bool:  # type: ignore[override]
        """As the view's."""
        return bool(self._view.dense)

    def read(self, m: nn.Module) -> Tensor:
        """W as numbers, (..., O, I)."""
        return full(self._view.read(m))

    def bias(self, m: nn.Module) -> Tensor | None:
        """b, (O,), or None."""
        found: Tensor | None = full(self._view.bias(m))
        return found


class Roles:
    """A view that notes which of an adapter's tensors count in-features, and which out-features."""

    def __init__(self, view: Any):
        self._view = view
        self.made: dict[int, str] = {}  # identity of a module or parameter -> "in" or "out"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def down(self, m: nn.Module, r: int, blocks: int = 1, **kwargs: Any) -> Any:
        """Holder of A."""
        return self._noted("in", blocks, self._view.down(m, r, blocks, **kwargs))

    def up(self, m: nn.Module, r: int, bias: bool = False, blocks: int = 1, **kwargs: Any) -> Any:
        """Holder of B."""
        return self._noted("out", blocks, self._view.up(m, r, bias, blocks, **kwargs))

    def _noted(self, role: str, blocks: int, made: Any) -> Any:
        if blocks == 1:
            self.made[id(made)] = role
        return made
