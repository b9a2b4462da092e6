"""The contract of a view, written for nn.Linear; transformers' Conv1D.

Letters: O out-features, I in-features (for a convolution: channels times kernel), r rank, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import slim
from .. import storage
from ..draw import normal
from ..onload import brought
from .make import diagonal, linear_module

Pair = tuple[int, ...]
Layer = Any  # a module of the view's layout: its attributes are known to the view, not to a type checker


class LinearView:
    """nn.Linear and whatever keeps its contract: weight (O, I), features on the last axis."""

    label = "Linear"
    name = "weight"
    bias_name = "bias"
    infix = ""  # LoRA files its tensors as lora_{infix}A and lora_{infix}B
    one_hot = False  # every input is, so that a bias may be written into W itself (`absorb`)
    sees_inputs = True  # what W is multiplied with is known from a call of the module (`vectors`)
    activations = True  # False: the layer cannot be split into W x and b; the whole module runs with W put in place
    drops = False  # whether dropout of the adapter's input has a meaning although the module reads its weight
    dense = True  # the last axis of the input is W's in-axis
    read_children: tuple[str, ...] = ()  # child layers whose weights the module reads instead of calling them
    masks: tuple[Any, ...] = ()  # arguments, by place and name, that are masks: for all rows, or for each row's heads
    methods: tuple[str, ...] = ()  # what else the module's parent may call

    def shape(self, m: Layer) -> Pair:
        """(O, I), with leading axes where the module holds several matrices."""
        if not hasattr(m, "out_features"):  # a quantiser's layer that calls them otherwise
            return storage.of(m, self.name).shape(m, self.name)
        return (m.out_features, m.in_features)

    def applied(self, m: Layer) -> bool:
        """Whether what `down` and `up` make are modules that give a low-rank update when they are called in turn."""
        return self.dense

    def kernel(self, m: Layer) -> Pair:
        """The size of a convolution's kernel, by which W's in-features run fastest; () elsewhere."""
        return ()

    def sample(self, m: Layer) -> Any:
        """The tensor beside which an adapter's tensors lie, in dtype and device."""
        return storage.sample(m, self.name)

    def parts(self, m: Layer) -> tuple[str, ...]:
        """The parameters that are adapted one by one where the module is a target but holds no single matrix."""
        return ()

    def check_dropout(self, path: str, argument: str) -> None:
        """Raise or warn where dropout of the adapter's input is asked for but the input is out of reach."""

    def matrix(self, m: Layer, raw: Tensor) -> Tensor:
        """The stored tensor as (..., O, I), without a copy."""
        return raw

    def raw(self, m: Layer, W: Tensor) -> Tensor:
        """(..., rows, I) in the stored layout; rows may differ from O."""
        return W

    def read(self, m: Layer) -> Tensor:
        """W as numbers, (..., O, I)."""
        return self.matrix(m, storage.of(m, self.name).read(m, self.name))

    def out_axis(self, m: Layer) -> int:
        """The axis of the stored tensor that counts out-features."""
        return 0

    def write_rows(self, m: Layer, start: int, W: Tensor) -> None:
        """Put (..., rows, I) in place of the rows from `start` on; for a dense storage."""
        stored = getattr(m, self.name).data
        stored.narrow(self.out_axis(m), start, W.shape[-2]).copy_(self.raw(m, W))

    def check_stored(self, m: Layer, path: str) -> None:
        """Raise ValueError where a new W would not be what the module computes with."""
        if storage.of(m, self.name).packed:
            return
        self.check_held(m, self.name, path)
        W = getattr(m, self.name)
        if 0 in W.stride() and any(n > 1 and not step for n, step in zip(W.shape, W.stride(), strict=True)):
            raise ValueError(
                f"Elements of the {self.name} of {path!r} share memory (it is expanded), so none other fits there. "
                "Give each its own, with .data = .data.clone(), before merging."
            )
        if not self.own_forward(m) or not W.is_floating_point() or W.is_meta:
            return
        with torch.no_grad():
            x = normal((2, self.shape(m)[-1]), torch.Generator().manual_seed(0)).to(W)
            found, wanted = m(x), F.linear(x, W, self.bias(m))
        fits = isinstance(found, Tensor) and found.shape == wanted.shape
        if not fits or not torch.allclose(found.float(), wanted.float(), rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{path!r} is a {type(m).__name__}, whose forward is not W x + b, so an adapter cannot be merged into "
                "its weight. Keep the adapter unmerged."
            )

    def check_held(self, m: Layer, name: str, path: str) -> None:
        """Raise ValueError where the weight or the bias is made of other tensors."""
        if name not in m._parameters and name not in m._buffers and storage.named(m, name) is None:
            raise ValueError(
                f"The {name} of {path!r} is computed at each call (a parametrization, weight norm or pruning), so "
                "an adapter cannot be merged into it. Make it permanent first, with "
                "torch.nn.utils.parametrize.remove_parametrizations or its like, before adding adapters."
            )

    def own_forward(self, m: Layer) -> bool:
        """Whether the module is of a class that replaces nn.Linear's forward."""
        return isinstance(m, nn.Linear) and type(m).forward is not nn.Linear.forward

    def refuse_low_rank(self, m: Layer) -> None:
        """Raise NotImplementedError where the product of the factors is not of W's shape."""

    def bias(self, m: Layer) -> Tensor | None:
        """b, (O,), or None."""
        b: Any = getattr(m, self.bias_name, None)
        b = b() if callable(b) else b  # as some quantised layers have it
        return b if b is None or not b.is_meta else brought(m, self.bias_name, b)

    def absorb(self, m: Layer, W: Tensor, b: Tensor) -> Tensor:
        """(..., rows, I) with a bias, (rows,), in it; where inputs are one-hot."""
        raise NotImplementedError

    def linear(self, m: Layer, x: Tensor, W: Tensor) -> Tensor:
        """W x without bias; W may have any number of rows."""
        return slim.linear(x, W).contiguous()  # which a caller may view as it likes

    def vectors(self, m: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What W is multiplied with in a call of the module: vectors (N, I), or the places of the one in one-hot ones.

        Several of the kind where rows of W have inputs of their own.
        """
        x = main_input(args, kwargs)
        return [x.flatten(0, -2) if x.dim() > 1 else x[None]]

    def child_vectors(self, m: Layer, child: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """`vectors` of one of `read_children`, in a call of its parent m."""
        raise NotImplementedError

    def rows(self, h: Tensor, B: Tensor, b: Tensor | None = None) -> Tensor:
        """B h + b on the feature axis of an output h, (..., r) -> (..., O)."""
        return slim.up(h, B, b)

    def spread(self, m: Layer, v: Tensor) -> Tensor:
        """(O,) shaped to broadcast over an output."""
        return v

    def groups(self, m: Layer) -> int:
        """Into how many groups the rows of W fall, each of which sees in-features of its own."""
        return 1

    def inputs(self, m: Layer) -> int:
        """How many features an input has: in-features, channels or tokens."""
        return self.shape(m)[-1]

    def per_input(self, m: Layer, v: Tensor) -> Tensor:
        """One number per input feature, (..., n), shaped to broadcast over W."""
        return v[..., None, :]

    def scale_input(self, m: Layer, x: Tensor, v: Tensor) -> Tensor | None:
        """The input with each feature multiplied, or None where only W can be."""
        return x * v if self.dense else None

    def drop(self, x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
        """Dropout of the input: (x to use, factor for W x or None)."""
        return F.dropout(x, p), None

    def shrunk(self, m: Layer, x: Tensor, A: Tensor, p: float) -> Tensor | None:
        """A dropout(x) in a form that keeps less for the backward pass; None where there is none."""
        return None

    def finishes(self, m: Layer) -> bool:
        """Whether `finish` does anything."""
        return False

    def finish(self, m: Layer, y: Tensor) -> Any:
        """What the module does after the affine map."""
        return y

    def output(self, given: Any) -> Tensor:
        """The affine map's part of what a call of the module gives."""
        y: Tensor = given
        return y

    def base(self, m: Layer, x: Tensor) -> Tensor:
        """The module's own affine map; m's forward unless `finish` undoes the split."""
        return self.output(m(x))

    def down(self, m: Layer, r: int, blocks: int = 1, **kwargs: Any) -> nn.Module | nn.Parameter:
        """Holder of A, I -> r, in the shape that checkpoints have for this layout.

        A factor of several `blocks` is block diagonal, each from a slice of its inputs to one of its outputs.
        """
        return linear_module(self.shape(m)[-1] // blocks, r, **kwargs)

    def up(self, m: Layer, r: int, bias: bool = False, blocks: int = 1, **kwargs: Any) -> nn.Module | nn.Parameter:
        """Holder of B, r -> O."""
        return linear_module(r // blocks, self.shape(m)[-2], bias, **kwargs)

    def A(self, m: Layer, held: Tensor, blocks: int = 1) -> Tensor:
        """(..., r, I) from what `down` holds."""
        return diagonal(held, blocks)

    def B(self, m: Layer, held: Tensor, blocks: int = 1) -> Tensor:
        """(..., O, r) from what `up` holds."""
        return diagonal(held, blocks)

    def held(self, m: Layer, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `A` and `B`: factors in the shape of their holders."""
        return A, B

    def vector(self, m: Layer, v: Tensor) -> Tensor:
        """(O,) in the shape that checkpoints have for one number per out-feature."""
        return v

    def norm_product(self, m: Layer, A: Tensor, B: Tensor) -> Tensor | None:
        """What stands for B A beside the stored weight when a row's norm is taken; None: B A itself."""
        return None


def main_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's first argument, which may be named."""
    return args[0] if args else next(iter(kwargs.values()))


class TransposedView(LinearView):
    """A weight stored as (I, O)."""

    def matrix(self, m: Layer, raw: Tensor) -> Tensor:
        return raw.mT

    def raw(self, m: Layer, W: Tensor) -> Tensor:
        return W.mT

    def out_axis(self, m: Layer) -> int:
        return 1


class Conv1DView(TransposedView):
    """transformers' Conv1D: weight stored as (I, O)."""

    def shape(self, m: Layer) -> Pair:
        return (m.nf, m.weight.shape[0])
