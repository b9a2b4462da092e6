"""Running a layer whose weight is spread over a mesh (tensor parallelism), and placing its adapters beside the weight.

An adapter's tensor that counts in- or out-features is split as the weight is on that axis; any other lies whole on
every process. There are two ways to run. A method whose shortcut is made of products and sums (`Method.spread`) runs on
DTensors, which bring rank-sized tensors together where they must. Every other method sees whole tensors: the input is
gathered, the weight too if it is read, and each process takes its part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..stack import Adapter, Stack
from .edge import Apart, Edge, Roles, Seen, replicated
from .gather import full, is_mesh, like_first

Run = Callable[[Tensor], Tensor]


class SpreadStack(Stack):
    """A stack whose base weight is, or may be, spread over a mesh while it runs."""

    def __call__(self, x: Tensor) -> Tensor:
        base = self.base
        weight = base._parameters.get(self.view.name)
        if self.last is None or not is_mesh(weight):  # FSDP2 lends the weight whole
            return super().__call__(x)
        edge = Edge(self.view, base, weight)
        if "forward" not in base.__dict__:
            return self._inside(edge, x)
        given: list[Tensor] = []

        def run(inner: Tensor) -> Tensor:
            given.append(edge.found(self._plain(base, x if inner is entered else edge.part(inner, placements))))
            return given[-1]

        entered = edge.enter(x)
        placements = entered.placements  # type: ignore[attr-defined]
        found = self._adapted(entered, run)
        if not given:  # nothing has told yet how the module places its outputs
            with torch.no_grad():
                run(entered)
        y = edge.part(found, given[0].placements)  # type: ignore[attr-defined]
        return y.to_local()  # type: ignore[attr-defined]

    def _plain(self, base: nn.Module, x: Tensor) -> Tensor:
        """The module by itself, on what this process holds of an input."""
        held = x.to_local() if is_mesh(x) else x  # type: ignore[attr-defined]
        args, kwargs = ((), {}) if self.extra is None else self.extra
        return base(held, *args, **kwargs)

    def _inside(self, edge: Edge, x: Tensor) -> Tensor:
        """Run the adapters inside the module's hooks, which turn its inputs into DTensors and its outputs back."""
        base: Any = self.base
        args, kwargs = ((), {}) if self.extra is None else self.extra

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            def run(x: Tensor) -> Tensor:
                return type(base).forward(base, edge.part(x, placements), *args, **kwargs)

            entered = edge.enter(x)
            placements = entered.placements  # type: ignore[attr-defined]
            return edge.part(self._adapted(entered, run, inside=True), None)

        base.__dict__["forward"] = forward
        try:
            return base(x, *args, **kwargs)
        finally:
            del base.__dict__["forward"]

    def _adapted(self, x: Tensor, run: Run, inside: bool = False) -> Tensor:
        """What the adapters make of a DTensor; `run` is the module on a DTensor or a whole tensor.

        Inside the module's hooks the module's and the adapters' sums of parts are brought together as one.
        """
        if all(runs_spread(a) for a in self.adapters):
            return Within(self, self.adapters, run, None if inside else Apart(self.view))(x)
        with lent(self.adapters):
            return Within(self, self.adapters, lambda whole: full(run(whole)), Seen(self.view))(full(x))

    def weight(self, rows: slice = slice(None)) -> Tensor:
        """W' of some rows, whole."""
        with lent(self.adapters):
            return super().weight(rows)

    def live_weight(self) -> Tensor:
        """W', whole."""
        with lent(self.adapters):
            return Within(self, self.adapters, self, Seen(self.view)).live_weight()

    def bias(self) -> Tensor | None:
        """b', whole."""
        with lent(self.adapters):
            return Within(self, self.adapters, self, Seen(self.view)).bias()

    def stored(self, name: str, value: Tensor) -> Tensor:
        """A whole value as the module's tensor `name` is spread."""
        held = self.base._parameters.get(name)
        if not is_mesh(held):
            return value
        return Edge(self.view, self.base, held).part(value, held.placements)  # type: ignore[union-attr]

    @property
    def root(self) -> Stack:
        """The base layer alone."""
        return SpreadStack(self.layer, (), self.extra)

    def _replaced(self, adapter: Adapter, by: tuple[Adapter, ...]) -> Stack:
        return SpreadStack(self.layer, super()._replaced(adapter, by).adapters, self.extra)


class Within(Stack):
    """The stack as its adapters see it inside the mesh: `run` stands for the base layer."""

    def __init__(self, outer: Stack, adapters: tuple[Adapter, ...], run: Run, view: Any = None):
        super().__init__(outer.layer, (), outer.extra)
        self.outer, self.run, self.view = outer, run, view or outer.view
        self.adapters, self.last = adapters, adapters[-1] if adapters else None
        self.inner = Within(outer, adapters[:-1], run, view) if adapters else None

    def __call__(self, x: Tensor) -> Tensor:
        last = self.last
        return self.run(x) if last is None else last.method.forward(last, self.inner, x)

    def linear(self, x: Tensor, W: Tensor) -> Tensor:
        """W x without bias. What is a sum of parts is brought together at once where it is narrow (A x, and its
        gradient), and where it was looked up, as torch keeps a mask of that."""
        y = super().linear(x, W)
        if not is_mesh(y) or isinstance(self.view, Seen) or not (self.view.one_hot or isinstance(self.view, Apart)):
            return y
        rest = replicated(y.device_mesh)  # type: ignore[attr-defined]
        pairs = zip(y.placements, rest, strict=True)  # type: ignore[attr-defined]
        return y.redistribute(placements=[r if p.is_partial() else p for p, r in pairs])  # type: ignore[attr-defined]

    @property
    def root(self) -> Stack:
        """The base layer alone."""
        return Within(self.outer, (), self.run, self.view)

    def _replaced(self, adapter: Adapter, by: tuple[Adapter, ...]) -> Stack:
        return Within(self.outer, super()._replaced(adapter, by).adapters, self.run, self.view)


# The tensors of adapters --------------------------------------------------------------------------------------------


def holders(p: Adapter) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """(dictionary, name, tensor) of all that an adapter holds in its layer, and of what all its layers share."""
    for key, home in p.layer._modules.items():
        if key != "base_layer" and p.name in home:
            child = home._modules.get(p.name)
            modules = list(child.modules()) if child is not None else [home]
            for m in modules:
                for held in (m._parameters, m._buffers):
                    names = list(held) if child is not None else [n for n in held if n == p.name]
                    yield from ((held, n, held[n]) for n in names if held[n] is not None)
    for home in p.shared.values():
        for held in (home._parameters, home._buffers):
            if held.get(p.name) is not None:
                yield held, p.name, held[p.name]


def tensors_of(p: Adapter) -> list[Tensor]:
    """The tensors that an adapter holds."""
    return [tensor for _, _, tensor in holders(p)]


def runs_spread(p: Adapter) -> bool:
    """Whether an adapter's forward runs on DTensors: its method says so for itself, and they are DTensors."""
    return bool(vars(type(p.method)).get("spread")) and all(map(is_mesh, tensors_of(p)))


@contextmanager
def lent(adapters: tuple[Adapter, ...]) -> Iterator[None]:
    """Inside, the adapters' tensors are whole; gradients reach what they were gathered from."""
    spread = [h for p in adapters for h in holders(p) if is_mesh(h[2])]
    try:
        for held, name, tensor in spread:
            held[name] = full(tensor)
        yield
    finally:
        for held, name, tensor in spread:
            held[name] = tensor


@torch.no_grad()
def place(p: Adapter, roles: Roles) -> None:
    """Spread the tensors of a new adapter as its layer's weight is; the values are those of the first process."""
    base = p.layer.get_base_layer()
    edge = Edge(p.layer.view, base, getattr(base, p.layer.view.name))
    if (tied := getattr(p.method, "share", None)) is not None:  # what has been placed there
        p.method.tie(p, tied)
    for key, home in p.layer._modules.items():
        if key == "base_layer" or p.name not in home:
            continue
        child = home._modules.get(p.name)
        for m in [home] if child is None else child.modules():
            role = roles.made.get(id(child if m is child else None), "")
            _place(m, edge, role, roles, None if child is not None else p.name)


def _place(m: nn.Module, edge: Edge, role: str, roles: Roles, only: str | None) -> None:
    homes: tuple[dict[str, Any], ...] = (m._parameters, m._buffers)
    for held in homes:
        for name, tensor in held.items():
            if tensor is None or is_mesh(tensor) or (only is not None and name != only):
                continue
            mine = edge.placements(roles.made.get(id(tensor), role))
            value = like_first(tensor.detach(), edge.mesh, mine)
            held[name] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


@torch.no_grad()
def agree(p: Adapter, mesh: Any) -> None:
    """Give the tensors of a new adapter that lies whole on each process the values of the first one."""
    for _, _, tensor in holders(p):
        if not is_mesh(tensor) and not tensor.is_meta:
            tensor.copy_(replicate(tensor, mesh).to_local())  # type: ignore[attr-defined]


def replicate(tensor: Tensor, mesh: Any) -> Tensor:
    """A tensor that lies whole on every process of a mesh, with the values of the first one."""
    return like_first(tensor, mesh, replicated(mesh))
