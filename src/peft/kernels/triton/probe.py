"""Whether the kernels are right on this machine: each is tried beside its torch form before it is used.

The tensors are small, and the numbers in them sines, so that no generator is moved. A kernel that fails to compile,
does not fit into the device, or gives other numbers than torch, is not used there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gained, launch, update
from .bank import Ragged
from .segments import segments
from .update import How

N, D, K, RATE, SCALE = 37, 80, 65, 0.25, 0.5
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def close(found: Any, wanted: Any, kind: torch.dtype) -> bool:
    """Whether tensors are the same but for rounding in `kind`, as a share of the largest element."""
    rough = kind is torch.float32 and launch.precision(kind) != "ieee"
    limit = 1e-2 if rough else LIMITS[kind]
    pairs = [(f.detach().double(), w.detach().double()) for f, w in zip(found, wanted, strict=True)]
    return all(bool((f - w).abs().max() <= limit * w.abs().max()) for f, w in pairs)


class Maker:
    """Makes tensors of a device, that want gradients."""

    def __init__(self, device: torch.device, rank: int, x: torch.dtype, A: torch.dtype):
        self.device, self.rank, self.kinds, self.number = device, rank, (x, A), itertools.count(1)

    def __call__(self, *shape: int, kind: torch.dtype | None = None) -> Tensor:
        size = torch.Size(shape).numel()
        t = torch.arange(1, size + 1, dtype=torch.float32, device=self.device) * (0.7 + next(self.number) / 7)
        return t.sin().view(shape).to(kind or self.kinds[0]).requires_grad_()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self(self.rank, D, kind=self.kinds[1]), self(self.rank, K, kind=self.kinds[1])

    def both(self, form: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> bool:
        """Whether a form has the values and gradients that its definition has in double precision."""
        exact = [t.detach().double().requires_grad_() for t in inputs]
        y, wanted = form(*inputs), plain(*exact)
        g = self(*y.shape, kind=y.dtype).detach()
        found = (y, *torch.autograd.grad(y, inputs, g))
        return close(found, (wanted, *torch.autograd.grad(wanted, exact, g.double())), self.coarser)

    @property
    def coarser(self) -> torch.dtype:
        return max(self.kinds, key=lambda kind: torch.finfo(kind).eps)

    def dropped(self, x: Tensor) -> tuple[How, Tensor]:
        """An update with dropout, and its mask."""
        seed = torch.tensor([2**40 + 7], device=self.device)
        how = How(SCALE / (1 - RATE), self.rank, RATE, seed)
        mask = launch.mask(x, seed, RATE)
        return how, mask


def thin(make: Maker) -> bool:
    """`update.linear` and `update.add`, with dropout."""
    x, y, W, (A, B) = make(N, D), make(N, K), make(K, D).detach(), make.factors()
    how, mask = make.dropped(x)

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return update.plain(x @ W.to(x.dtype).mT, x, A, B, how, mask)

    added = make.both(lambda *t: update._Add.apply(*t, how), partial(update.plain, how=how, mask=mask), y, x, A, B)
    fused = make.both(lambda x, A, B: update._Linear.apply(x, W, None, A, B, how), product, x, A, B)
    return added and fused and 0.6 < float(mask.float().mean()) < 0.9


def few(make: Maker) -> bool:
    """`update.decode`."""
    x, W, (A, B) = make(3, D).detach(), make(K, D).detach(), (t.detach() for t in make.factors())
    found = update.decode(x, W, None, A, B.mT.contiguous(), SCALE)
    x, W, A, B = (t.double() for t in (x, W, A, B))
    return close([found], [update.plain(x @ W.mT, x, A, B, How(SCALE, make.rank))], make.coarser)


def bank(make: Maker) -> bool:
    """`update.mixed`: three ranks, an adapter without rows, and a row without an adapter."""
    ranks, x, y = (make.rank, 1, max(1, make.rank // 2)), make(6 * 5, D), make(6 * 5, K)
    A, B = make(sum(ranks), D, kind=make.kinds[1]), make(sum(ranks), K, kind=make.kinds[1])
    starts = torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32, device=make.device)
    at = segments([(0, [4, 1, 2]), (2, [0, 5]), (-1, [3])], 3, 5, make.device)
    how = How(SCALE, make.rank, at=at, starts=starts)
    placed = update.place(y.detach().clone(), x.detach(), A.detach(), B.detach(), how)
    same = close([placed], [update.plain(y.double(), x.double(), A.double(), B.double(), how)], make.coarser)
    return same and make.both(partial(update.mixed, how=how), partial(update.plain, how=how), y, x, A, B)


def gain(make: Maker) -> bool:
    """`gained.add` with dropout."""
    x, y, (A, B), b = make(N, D), make(N, K), make.factors(), make(K)
    m, n = make(K, kind=make.kinds[1]), make(K, kind=torch.float32).detach().abs() + 1
    how, mask = make.dropped(x)

    def form(y: Tensor, x: Tensor, A: Tensor, B: Tensor, m: Tensor, b: Tensor) -> Tensor:
        return gained._Gained.apply(y, x, A, B, how, m, n, b)

    def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, m: Tensor, b: Tensor) -> Tensor:
        return gained.plain(y, x, A, B, how, m / n, b, mask)

    return make.both(form, plain, y, x, A, B, m, b)


def norms(make: Maker) -> bool:
    """`gained.norms`."""
    W, (A, B) = make(K, D).detach(), (t.detach().float() for t in make.factors())
    found = gained.norms(W, W.float().square().sum(-1), A, B.mT.contiguous(), SCALE)
    return close([found], [torch.linalg.vector_norm(W.float() + SCALE * B.mT @ A, dim=-1)], torch.float32)


TRIED = {"thin": thin, "few": few, "bank": bank, "gain": gain, "norms": norms}


@torch.inference_mode(False)
@torch.enable_grad()
def right(form: str, device: torch.device, rank: int, x: torch.dtype, A: torch.dtype) -> bool:
    """Whether a form gives torch's numbers on a device; raises whatever Triton raises.

    Arguments:
        form: a key of TRIED.
        device: a GPU.
        rank: of the factors, at most 128; ranks up to the next power of two are tried at once.
        x, A: the dtypes of activations and factors.
    """
    return TRIED[form](Maker(device, launch.block(rank, 16, launch.WIDEST), x, A))


__all__ = ["Ragged", "gained", "right", "update"]
