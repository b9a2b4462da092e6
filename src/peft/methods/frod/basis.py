"""What layers of one kind share in FRoD: V, from all their weights, and the places of S, from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...core.shared import Sight, is_late, seeded_on
from ...core.unload import progress
from ...kernels.modes import has_double

LEAST = 1e-12  # a column of this norm is zero
LARGE = 2**23  # numbers; more are not held in single precision at once
PART = 2**21  # numbers that are, then


def kind_of(path: str) -> str:
    """What the layers are called that share V: the last two names of the path, or the last one behind a number."""
    # "base_layer" stands in between in a wrapped module, and may be a model's own name of the only one
    parts = [part for part in path.split(".") if part != "base_layer"] or [path]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    return f"{parts[-2]}_{parts[-1]}"


def number_of(path: str) -> int | None:
    """The number of the layer: behind `layers`, or the first."""
    parts = path.split(".")
    behind = [b for a, b in pairwise(parts) if a == "layers"][:1]
    found = [int(part) for part in (*behind, *parts) if part.isdigit()]
    return found[0] if found else None


class Kind:
    """Layers that share V.

    Arguments:
        size: of V.
    """

    def __init__(self, size: int):
        self.size = size
        self.sights: dict[int, Sight] = {}  # by the layer's number

    def add(self, sight: Sight) -> None:
        """One layer more; of several with one number the last counts, as in the peer's files."""
        number = number_of(sight.path)
        self.sights[len(self.sights) if number is None else number] = sight

    def matrices(self) -> Iterator[Tensor]:
        """All matrices, (out, size), in the order of the layers' numbers; on the CPU."""
        for _, sight in sorted(self.sights.items()):
            stack = table(sight.view, sight.weight().detach())
            yield from stack.to("cpu").reshape(-1, *stack.shape[-2:])

    def heights(self) -> list[int]:
        """How many rows the matrices have."""
        shapes = [table(sight.view, sight.shape) for _, sight in sorted(self.sights.items())]
        return [s[-2] for s in shapes for _ in range(math.prod(s[:-2]))]

    def basis(self, alpha: float) -> Tensor:
        """V, (size, size), in the weights' dtype and on their device."""
        like = next(iter(self.sights.values())).weight()
        dtype = like.dtype if like.is_floating_point() else torch.float32
        if like.device.type == "meta" or is_late():
            return torch.empty(self.size, self.size, dtype=dtype, device="meta")
        device = like.device
        del like
        heights = self.heights()
        numbers = self.size * max(sum(heights), self.size * len(heights))
        if sum(heights) < self.size:
            V = torch.linalg.svd(torch.cat([W.float() for W in self.matrices()]), full_matrices=True)[2].mT
        elif numbers <= LARGE:
            Q, R = torch.linalg.qr(torch.cat([W.float() for W in self.matrices()]))
            eye = torch.eye(self.size, dtype=torch.float32, device="cpu")
            inverses = [torch.linalg.inv(q.mT @ q + alpha * eye) for q in Q.split(heights)]
            V = R.mT @ torch.linalg.eigh(torch.stack(inverses).mean(0))[1]
        else:
            V = self.by_parts(alpha, len(heights))
        return V.to(device, dtype).contiguous()

    def by_parts(self, alpha: float, count: int) -> Tensor:
        """V from one matrix after the other, of which some rows are in single precision at a time.

        R is that of the rows seen so far over the next ones; Q_k is W_k R^-1.
        """
        R = torch.zeros(0, self.size, dtype=torch.float32, device="cpu")
        for W in self.matrices():
            for rows in W.split(max(self.size, PART // self.size)):
                R = torch.linalg.qr(torch.cat([R, rows.float()]), mode="r")[1]
        at = R.diagonal()
        least = torch.finfo(R.dtype).eps * at.abs().max().clamp_min(LEAST)
        at.copy_(torch.where(at.abs() < least, least, at))  # features that no weight reads
        mean = torch.zeros(self.size, self.size, dtype=torch.float32, device="cpu")
        for W in self.matrices():
            gram = torch.zeros(self.size, self.size, dtype=torch.float32, device="cpu")
            for rows in W.split(max(1, PART // self.size)):
                q = torch.linalg.solve_triangular(R, rows.float(), upper=True, left=False)
                gram.addmm_(q.mT, q)
            gram.diagonal().add_(alpha)
            mean.add_(torch.linalg.inv(gram), alpha=1 / count)
            del gram
        E = torch.linalg.eigh(mean)[1]
        del mean
        return R.mT @ E


def bases(kinds: dict[str, Kind], settings: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, V) of every kind."""
    for name, kind in progress(list(kinds.items()), settings.progressbar and not is_late(), "FRoD"):
        yield name, kind.basis(settings.regularization_alpha)


def off_diagonal(size: int, rate: float) -> int:
    """How many numbers S has."""
    return min(max(int(size * size * rate), 1 if rate else 0), size * size - size)


def places(sizes: dict[str, int], settings: Any) -> dict[str, Tensor]:
    """The places of every kind's S, (2, n), and its size, under the names of the shared tensors."""
    generator = torch.Generator().manual_seed(settings.projection_prng_key)
    found: dict[str, Tensor] = {}
    for name, n in sorted(sizes.items()):
        every = torch.randperm(n * n - n, generator=generator, device=seeded_on())
        chosen = every[: off_diagonal(n, settings.sparse_rate)]
        row, column = (chosen // max(1, n - 1), chosen % max(1, n - 1))
        found[f"frod_s_indices.{name}"] = torch.stack([row, column + (column >= row)])
        found[f"frod_s_size.{name}"] = torch.tensor([n, n], device="cpu")
    return found


def left(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """(U, l0) with W = U diag(l0) V', solved in double precision, on the CPU where W's device has none.

    U is in V's dtype where it is large.
    """
    place = W.device if has_double(W.device) else torch.device("cpu")
    W, wide = W.detach().to(place), V.to(place).double()
    if W.numel() > LARGE:
        return left_by_parts(W, wide, V.dtype)
    right = W.detach().double().mT
    try:
        M = torch.linalg.solve(wide, right).mT
    except torch.linalg.LinAlgError:
        M = (torch.linalg.pinv(wide, rtol=1e-6) @ right).mT
    scale = torch.linalg.vector_norm(M, dim=-2)
    return torch.where(scale > LEAST, 1 / scale.clamp_min(LEAST), 0.0)[..., None, :] * M, scale


def left_by_parts(W: Tensor, wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same with some rows of W at a time: once for the norms of U's columns, once for U."""
    factors = torch.linalg.lu_factor_ex(wide)
    inverse = torch.linalg.pinv(wide, rtol=1e-6) if factors.info else None
    del wide

    def solved(rows: Tensor) -> Tensor:
        right = rows.double().mT
        return (torch.linalg.lu_solve(*factors[:2], right) if inverse is None else inverse @ right).mT

    out, size = W.shape[-2:]
    flat = W.detach().reshape(-1, out, size)
    U = torch.empty(flat.shape, dtype=dtype, device=W.device)
    squares = torch.zeros(len(flat), size, dtype=torch.float64, device=W.device)
    step = max(1, PART // size)
    parts = [(k, slice(start, start + step)) for k in range(len(flat)) for start in range(0, out, step)]
    for k, rows in parts:
        squares[k] += solved(flat[k, rows]).square_().sum(0)
    scale = squares.sqrt_()
    factor = torch.where(scale > LEAST, 1 / scale.clamp_min(LEAST), 0.0)
    for k, rows in parts:
        U[k, rows] = (solved(flat[k, rows]) * factor[k]).to(dtype)
    return U.view(W.shape), scale.view(*W.shape[:-2], size)


def table(view: Any, of: Any) -> Any:
    """The matrix that is decomposed, or its shape: W, or an embedding's table."""
    if not view.infix:
        return of
    return of.mT if isinstance(of, Tensor) else (*of[:-2], of[-1], of[-2])
