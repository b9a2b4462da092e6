"""What one adapter adds to one layer, W' - W and b' - b, as low-rank factors where it has them, else dense.

A layer may hold several matrices: experts, or the groups of a convolution, for which a low-rank adapter reads all
channels. Products are stacked along a first axis then, one for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..core.layer import BaseTunerLayer, tuner_layers
from ..core.method import Delta, LowRank
from ..core.sharded import full
from ..core.stack import Adapter
from ..core.tokens import TokenRows
from ..kernels.modes import single
from .factors import Pair, exactly


@dataclass(frozen=True)
class Form:
    """How a layer stacks its matrices in a low-rank adapter's file.

    Arguments:
        layer: the tuner layer.
    """

    layer: BaseTunerLayer

    @property
    def base(self) -> Any:
        """The adapted module."""
        return self.layer.get_base_layer()

    @property
    def groups(self) -> int:
        """Groups of a convolution, by which a file's rank is a multiple of that of each product."""
        return self.layer.view.groups(self.base)

    def stacked(self, pair: Pair) -> Pair:
        """The factors that a method states, (r, I) and (O, r), with each group's block for itself."""
        g = self.groups
        if g == 1:
            return pair
        blocks = pair.B.unflatten(0, (g, -1)).unflatten(-1, (g, -1))
        return Pair(pair.A.unflatten(0, (g, -1)), torch.stack([blocks[i, :, i] for i in range(g)]))

    def wide(self, D: Tensor) -> Tensor:
        """A dense update of the stored shape (O, I / g) as one matrix over all channels for each group."""
        g = self.groups
        if g == 1:
            return D
        D = D.unflatten(-2, (g, -1))
        full = D.new_zeros(*D.shape[:-1], g, D.shape[-1])
        for i in range(g):
            full[i, :, i] = D[i]
        return full.flatten(-2)

    def held(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The tensors of a file, in the shapes of `LinearView.down` and `up`."""
        A, B = (t.flatten(0, 1) for t in pair) if self.groups > 1 else pair
        return self.layer.view.held(self.base, A, B)


@dataclass
class Update:
    """One adapter's share of a sum.

    Arguments:
        p: the adapter in one layer.
        weight: what its update is multiplied with.
    """

    p: Adapter
    weight: float = 1.0

    @property
    def form(self) -> Form:
        """How its layer stacks matrices."""
        return Form(self.p.layer)

    @property
    def method(self) -> Any:
        """The adapter's method; that inside where another one (DoRA's norm) stands around it."""
        return getattr(self.p.method, "of", self.p.method)

    @property
    def wrapped(self) -> bool:
        """Whether a method stands around another one."""
        return self.method is not self.p.method

    @cached_property
    @torch.no_grad()
    def inner_factors(self) -> Pair | None:
        """The factors of the method inside, without the scaling, or None if it has none."""
        method, p = self.method, self.p
        if isinstance(method, LowRank):
            if method.whole or self.form.groups == 1:
                A, B = (t.detach() for t in method.factors(p))
                lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])  # a factor may be the same for all experts
                return self.form.stacked(Pair(*(t.expand(*lead, *t.shape[-2:]) for t in (A, B))))
            return None
        known = isinstance(method, (Delta, TokenRows)) and self.form.groups == 1
        exact = method.exact_factors(p) if known else None
        return None if exact is None else Pair(*(t.detach() for t in exact))

    @property
    def factors(self) -> Pair | None:
        """The factors without the scaling, where W' - W is their product."""
        return None if self.wrapped else self.inner_factors

    @property
    def scale(self) -> float:
        """The scaling of the factors' product."""
        method = self.method
        if not isinstance(method, LowRank):
            return 1.0
        scale = method.scaling(self.p)
        return float(scale.detach() if isinstance(scale, Tensor) else scale) * method.times

    @property
    def rank(self) -> int:
        """The rank of the factors, 0 without."""
        return self.inner_factors.rank if self.inner_factors is not None else 0

    @torch.no_grad()
    def dense(self, inside: bool = False) -> Tensor:
        """W' - W of the original base weight, (..., O, I) as the form stacks it, in float32 or better.

        Arguments:
            inside: the update of the method inside instead.
        """
        found = self.inner_factors if inside else self.factors
        if found is not None:
            return found.scaled(self.scale).product()
        p, method = self.p, self.method if inside else self.p.method
        W = p.layer.original_weight()
        if isinstance(method, Delta) and method is self.method:
            D = method.delta(p, single(W))
        else:
            W = exactly(W)  # the difference of two large matrices
            D = method.weight(p, W) - W
        return self.form.wide(single(D))

    @torch.no_grad()
    def bias(self) -> Tensor | None:
        """b' - b, or None where the bias stays as it is."""
        p, method = self.p, self.method
        if isinstance(method, LowRank):
            extra = method.up_bias(p)
            return None if extra is None else (extra * method.scaling(p)).detach().float()
        b = full(p.layer.view.bias(p.layer.get_base_layer()))
        new = p.method.bias(p, b)
        if new is None or new is b:
            return None
        return new.float() if b is None else new.float() - b.float()


def updates(
    model: nn.Module, names: dict[str, float], whole: bool = False, tokens: bool = False
) -> dict[str, list[Update]]:
    """{path of a layer in the model: the shares of the adapters that stand there}.

    Arguments:
        model: the model.
        names: the weight of each adapter.
        whole: the layers whose adapters replace a whole module, instead of those that change a weight.
        tokens: those that replace rows for tokens, instead of both.
    """
    found: dict[str, list[Update]] = {}
    for path, layer in tuner_layers(model):
        if not isinstance(layer, BaseTunerLayer) or layer._whole is not whole:
            continue
        mine = [Update(layer.adapters[n], w) for n, w in names.items() if n in layer.adapters and n not in layer.shares]
        mine = [u for u in mine if isinstance(u.p.method, TokenRows) is tokens]
        if mine:
            found[path] = mine
    return found
