"""What views make: modules, quickly, as torch's constructors cost more than all else that wrapping a layer does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..lean import NO_BUFFERS, SHARED, Lean


class Linear(Lean, nn.Linear):
    """torch's, without tables for hooks until there is one."""


class ModuleDict(Lean, nn.ModuleDict):
    """torch's, likewise."""


class ParameterDict(Lean, nn.ParameterDict):
    """torch's, likewise."""


PLAIN = frozenset({nn.Linear, Linear})  # the classes whose call is W x + b, and nothing else
SETTLED = PLAIN | {nn.Identity}  # those whose call is the same in training and evaluation


class Template:
    """Makes modules like a given childless one at a tenth of its constructor's cost: its values, fresh containers.

    Arguments:
        module: what it has in common with those to be made.
        kind: their class; None is that of `module`.
    """

    def __init__(self, module: nn.Module, kind: type[nn.Module] | None = None):
        self.kind = type(module) if kind is None else kind
        held = {k: v for k, v in module.__dict__.items() if k not in SHARED or not issubclass(self.kind, Lean)}
        self.values = [(k, v) for k, v in held.items() if not hasattr(v, "copy")]
        self.containers = [(k, type(v)) for k, v in held.items() if hasattr(v, "copy")]
        if issubclass(self.kind, Lean) and type(module._buffers) is dict:
            self.containers.remove(("_buffers", dict))
            self.values.append(("_buffers", NO_BUFFERS))

    def new(self) -> Any:
        """A module of its own."""
        module = self.kind.__new__(self.kind)
        d = module.__dict__
        for key, value in self.values:  # one by one, as dictionaries of objects are small that way
            d[key] = value
        for key, kind in self.containers:
            d[key] = kind()
        return module


def linear_module(inp: int, out: int, bias: bool = False, **kwargs: Any) -> nn.Linear:
    """nn.Linear with uninitialised weights: its owner fills them, so torch's own draw would be wasted."""
    module: nn.Linear = _TEMPLATE.new()
    module.__dict__["in_features"], module.__dict__["out_features"] = inp, out
    module._parameters["weight"] = nn.Parameter(torch.empty(out, inp, **kwargs))
    module._parameters["bias"] = nn.Parameter(torch.empty(out, **kwargs)) if bias else None
    return module


def diagonal(M: Tensor, n: int) -> Tensor:
    """The block diagonal matrix, (..., rows, n cols), of the n blocks below each other in M, (..., rows, cols)."""
    if n == 1:
        return M
    eye = torch.eye(n, dtype=M.dtype, device=M.device).view(n, 1, n, 1)
    return (M.unflatten(-2, (n, -1)).unsqueeze(-2) * eye).flatten(-4, -3).flatten(-2)


_TEMPLATE = Template(nn.Linear(1, 1, bias=False, device="meta"), Linear)  # elsewhere it would draw random numbers
