"""DoRA's magnitude m, as a module of its own, and as a gain in mixed batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import views
from ..core.direct import is_ordinary
from ..core.kept import Kept, base_places, kept, kept_over
from ..core.method import Delta, LowRank
from ..core.stack import Adapter, Stack
from ..kernels import narrow
from ..kernels.modes import is_autocast, lasting, ordinary, single, transformed, without_autocast
from ..kernels.scaled import folded, square


class Gaining(Delta):
    """The part of DoRA that tells how it may run beside other adapters in a mixed batch."""

    _thin: Callable[..., LowRank | None]
    gain: Callable[[Adapter], Tensor]
    of: Delta

    def magnitude(self, p: Adapter) -> Tensor:
        """m, (..., O)."""
        m: Tensor = p.held("lora_magnitude_vector").weight
        return m if p.layer.view.label == "ParamWrapper" else m.flatten()

    def kept_gain(self, p: Adapter) -> Tensor:
        """`gain`, as evaluation keeps it of a layer that is neither dense, whose factors it keeps, nor quantised."""
        if p.layer.packed or p.layer.view.dense:
            return self.gain(p)
        found: Tensor = kept(p, lambda: self.gain(p), base=True, what="gain")
        return found

    def evaluated(self, p: Adapter, of: LowRank, inner: Stack, y: Tensor, x: Tensor, b: Tensor | None) -> Tensor | None:
        """gain (y - b + s B A x) + b beside a quantised layer's y, or under autocast; None where no gain is kept."""
        called = inner.packed or (is_autocast(x) and is_ordinary(inner.base))
        if not called or torch.is_grad_enabled() or transformed():
            return None
        with without_autocast(x):

            def make() -> tuple[Tensor, Tensor, Tensor]:
                return self.folded(p, of, *of.factors(p))

            A, gain, B = kept_over(p, make) if inner.packed else kept(p, make, base=True)
            return narrow.beside(y, x, A, B, 1.0, gain, b)

    def folded(self, p: Adapter, of: LowRank, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, the gain, and B with all factors in it, in single precision or more: what evaluation keeps."""
        A, B = (single(t) for t in (A, B))
        return folded(A, B, of.scaling(p), self.gain(p).to(A.dtype))

    @property
    def factored(self) -> bool:  # type: ignore[override]
        return self.of.factored

    def up_bias(self, p: Adapter) -> Tensor | None:
        return self.of.up_bias(p)

    def term(self, p: Adapter) -> tuple[Any, ...] | None:
        of = self._thin(p, biased=True)
        term = None if of is None else of.term(p)
        if term is None:
            return None
        A, B, s = term
        g = self.gain(p).to(B.dtype)
        return A, B * g[..., None], s, g

    def squares(self, p: Adapter, W: Tensor, rows: slice) -> Tensor:
        """|W|^2 of each row, (..., rows); that of all is computed again only when the base weight changes."""
        anew = (
            torch.compiler.is_compiling() or rows != slice(None) or W.requires_grad
        )  # what is trained changes uncounted
        key = None if anew else p.layer.original_key(W)
        if key is None or not lasting():
            return square(W[..., rows, :])
        if p.cache.get("key") != key:
            with ordinary():
                p.cache.update(key=key, square=square(W))
        return p.cache["square"]

    def base_square(self, p: Adapter, W: Tensor, rows: slice) -> Tensor:
        """`squares`, quickly where that of a whole weight is asked for which stands in its layer."""
        base = p.layer.get_base_layer()
        plain = type(base._parameters.get("weight")) is nn.Parameter and "_hf_hook" not in base.__dict__
        if rows == slice(None) and plain and not (p.layer.packed or torch.compiler.is_compiling()):
            found = self.squares_now(p, W)
            if found is not None:
                return found
        return self.squares(p, W, rows)

    def squares_now(self, p: Adapter, W: Tensor) -> Tensor | None:
        """The same of all rows, found quickly, for the weight W of a dense layer; None while merged. Not for graphs."""
        if p.layer._saved is not None:
            return None
        noted = p.cache.get("noted")
        if noted is None or not noted.holds(p.layer):
            squares = self.squares(p, W.detach(), slice(None))
            if W.is_inference() or not lasting():  # the writes to which are not counted
                return squares
            noted = p.cache["noted"] = Kept(squares, p.layer, base_places(p)[:2])  # the third tells of merges
        return noted.value


class Magnitude(nn.Module):
    """Holds m under the name that checkpoints have; `label` is the layout that it is printed with."""

    def __init__(self, weight: nn.Parameter, label: str):
        super().__init__()
        self.weight, self.label = weight, label

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float | Tensor,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What DoRA adds to the base's output: (g - 1) W x + g s B A x, g = m / |W + s B A| a constant but for m.

        Layers do not call it; programs with kernels of their own do.

        Arguments:
            x: (..., I), or (N, I, ...) for a convolution; dropped out already, if it is.
            lora_A, lora_B: the factors.
            scaling: s.
            base_layer: the layer that has W, without groups.
            base_result: its output for x, bias and all; None computes it.
            adapter_name: not needed.

        Source: Liu et al. 2024, arXiv 2402.09353, eq. 5 and section 4.3.
        """
        view = views.view_of(base_layer)
        with torch.no_grad():
            W = view.read(base_layer)
            norm = (W + scaling * (lora_B.weight.flatten(1) @ lora_A.weight.flatten(1)).to(W.dtype)).norm(dim=-1)
        gain = view.vector(base_layer, self.weight.flatten() / torch.where(norm == 0, torch.ones_like(norm), norm))
        plain = base_layer(x) if base_result is None else base_result
        bias = view.bias(base_layer)
        plain = plain if bias is None else plain - view.vector(base_layer, bias)
        return ((gain - 1) * plain + gain * scaling * lora_B(lora_A(x.to(lora_A.weight.dtype)))).to(plain.dtype)

    def __repr__(self) -> str:
        return f"lora.dora.Dora{self.label}Layer()"
