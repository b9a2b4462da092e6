"""nn.Conv1d, nn.Conv2d and nn.Conv3d."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...kernels import convolution
from .linear import Layer, LinearView, Pair, main_input
from .make import diagonal

ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # of torch's convolutions


class _WithKernel(TorchFunctionMode):
    """Convolves with a kernel, and no bias, where a module would with its own, and notes what comes out."""

    def __init__(self, function: Callable[..., Tensor], kernel: Tensor, found: list[Tensor]):
        super().__init__()
        self.function, self.kernel, self.found = function, kernel, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not self.function or self.found:
            return func(*args, **(kwargs or {}))
        given = dict(zip(ARGUMENTS, args, strict=False)) | (kwargs or {})
        channels = given["input"].shape[1 - self.kernel.dim()]
        y = func(**given | {"weight": self.kernel, "bias": None, "groups": channels // self.kernel.shape[1]})
        self.found.append(y)
        return y


class ConvView(LinearView):
    """nn.Conv1d to nn.Conv3d as a linear map of patches; features on axis 1.

    A grouped convolution's W is (O, channels of one group times kernel). On it checkpoints hold an ungrouped A
    (r, all channels, kernel) and a B (O, r / groups) that mixes r / groups rows per group. That update is no grouped
    kernel: it runs beside the base layer, and cannot be merged.
    """

    dense = False

    def __init__(self, dims: int):
        self.dims, self.label = dims, f"Conv{dims}d"
        self.function: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        self.module: type[nn.Module] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    def shape(self, m: Layer) -> Pair:
        return (m.out_channels, m.in_channels // m.groups * math.prod(m.kernel_size))

    def applied(self, m: Layer) -> bool:
        return type(m).forward is self.module.forward

    def kernel(self, m: Layer) -> Pair:
        return tuple(m.kernel_size)

    def matrix(self, m: Layer, raw: Tensor) -> Tensor:
        return raw.flatten(1)

    def raw(self, m: Layer, W: Tensor) -> Tensor:
        return W if W.dim() > 2 else W.unflatten(-1, (-1, *m.kernel_size))

    def refuse_low_rank(self, m: Layer) -> None:
        if m.groups != 1:
            raise NotImplementedError(
                f"A low-rank update of a {type(m).__name__} with groups={m.groups} mixes all input channels and is no "
                "grouped kernel, so it cannot be merged. Keep it unmerged, or exclude the layer (`exclude_modules`)."
            )

    def linear(self, m: Layer, x: Tensor, W: Tensor) -> Tensor:
        if type(m).forward is not self.module.forward and (y := self._as_called(m, x, self.raw(m, W))) is not None:
            return y
        padding = m.padding
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            padding = 0
        kernel = self.raw(m, W)
        return self.function(x, kernel, None, m.stride, padding, m.dilation, m.in_channels // kernel.shape[1])

    def shrunk(self, m: Layer, x: Tensor, A: Tensor, p: float) -> Tensor | None:
        if type(m).forward is not self.module.forward or m.padding_mode != "zeros" or isinstance(m.padding, str):
            return None
        kernel = self.raw(m, A)
        way = convolution.Way(m.stride, m.padding, m.dilation, m.in_channels // kernel.shape[1])
        return convolution.down(x, kernel, p, way)

    def _as_called(self, m: Layer, x: Tensor, kernel: Tensor) -> Tensor | None:
        """The product in a subclass, which may pad its input by itself; None if it calls no convolution of torch's."""
        found: list[Tensor] = []
        with _WithKernel(self.function, kernel, found):
            type(m).forward(m, x)
        return found[0] if found else None

    def vectors(self, m: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        x = main_input(args, kwargs)
        eye = torch.eye(self.shape(m)[-1], dtype=x.dtype, device=x.device)
        return [self.linear(m, x, eye).movedim(-1 - self.dims, -1).flatten(0, -2)]  # patches

    def rows(self, h: Tensor, B: Tensor, b: Tensor | None = None) -> Tensor:
        return self.function(h, B if B.dim() > 2 else B.view(*B.shape, *[1] * self.dims), b)

    def spread(self, m: Layer, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * self.dims)

    def groups(self, m: Layer) -> int:
        return int(m.groups)

    def inputs(self, m: Layer) -> int:
        return int(m.in_channels)

    def per_input(self, m: Layer, v: Tensor) -> Tensor:
        each = v.unflatten(-1, (m.groups, -1)).repeat_interleave(math.prod(m.kernel_size), -1)  # (g, I/g)
        return each.repeat_interleave(m.out_channels // m.groups, 0)

    def scale_input(self, m: Layer, x: Tensor, v: Tensor) -> Tensor | None:
        return x * v.view(-1, *[1] * self.dims)

    def down(self, m: Layer, r: int, blocks: int = 1, **kwargs: Any) -> nn.Module:
        self._check(m, r)
        return self.module(
            m.in_channels,
            r,
            m.kernel_size,
            m.stride,
            m.padding,
            m.dilation,
            groups=blocks,
            bias=False,
            padding_mode=m.padding_mode,
            **kwargs,
        )

    def up(self, m: Layer, r: int, bias: bool = False, blocks: int = 1, **kwargs: Any) -> nn.Module:
        self._check(m, r)
        return self.module(r, m.out_channels, 1, groups=math.lcm(m.groups, blocks), bias=bias, **kwargs)

    def _check(self, m: Layer, r: int) -> None:
        if r % m.groups:
            raise ValueError(
                f"r={r} is not a multiple of the {m.groups} groups of this {type(m).__name__}. "
                f"Use r={max(1, round(r / m.groups)) * m.groups}."
            )

    def A(self, m: Layer, held: Tensor, blocks: int = 1) -> Tensor:
        return diagonal(held.flatten(1), blocks)

    def B(self, m: Layer, held: Tensor, blocks: int = 1) -> Tensor:
        return diagonal(held.flatten(1), math.lcm(m.groups, blocks))  # one of groups is block diagonal already

    def held(self, m: Layer, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        ones = [1] * self.dims
        return A.unflatten(1, (m.in_channels, *m.kernel_size)), B.view(*B.shape, *ones)

    def vector(self, m: Layer, v: Tensor) -> Tensor:
        return v.view(1, -1, *[1] * self.dims)

    def norm_product(self, m: Layer, A: Tensor, B: Tensor) -> Tensor | None:
        # checkpoints of grouped convolutions hold magnitudes for this product: B's compact blocks, (O, r/g), are read
        # as (O/g, r), and the result as (O, I/g); it is no norm of the update, but every magnitude is relative to it
        g = m.groups
        if g == 1:
            return None
        blocks = B.unflatten(0, (g, -1)).unflatten(-1, (g, -1))
        compact = torch.stack([blocks[i, :, i] for i in range(g)])
        return (compact.reshape(-1, A.shape[0]) @ A).reshape(B.shape[0], -1)
