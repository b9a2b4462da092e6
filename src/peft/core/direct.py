"""Where the base layer's product may be computed from its weight, without calling the layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import _C, Tensor, nn
from torch.autograd import forward_ad

from ..kernels import lowrank, whole
from ..kernels.modes import PLAIN, WIDE, is_autocast, reused, transformed
from ..kernels.whole import touched
from . import recycled

if TYPE_CHECKING:
    from .method import Delta
    from .stack import Adapter, Stack

peek_interpreter_stack = _C._functorch.peek_interpreter_stack
FORWARD = nn.Linear.forward
FORMS: dict[type[nn.Module], object] = {}  # other classes of which calling is F.linear, as they were met: their forward
TURNED: set[type[nn.Module]] = set()  # those among them that hold W'
CONVS: dict[type[nn.Module], object] = {kind: kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
EVERYWHERE = tuple(  # hooks of all modules
    getattr(nn.modules.module, f"_global_{name}_hooks", {})
    for name in ("forward_pre", "forward", "backward_pre", "backward")
)


def is_product(base: nn.Module) -> bool:
    """Whether a module is of a class of which calling is F.linear, with its weight as it is or turned."""
    return form(type(base)) != ""


def form(kind: type[nn.Module]) -> str:
    """How a class of layers multiplies with its weight: "plain" or "turned"; "" for what is more than a product.

    In graphs that is a constant: they would be made again for each class that is met later.
    """
    if (FORWARD if kind is nn.Linear else FORMS.get(kind)) is not kind.forward:
        return ""
    return "turned" if kind in TURNED else "plain"


form._dynamo_marked_constant = True  # type: ignore[attr-defined]


def matrix(base: nn.Module, held: Tensor) -> Tensor:
    """W, (O, I), of such a module, from the weight that it holds."""
    return held.mT if type(base) in TURNED else held


def is_ordinary(base: nn.Module) -> bool:
    """Whether calling a module is torch's own product and nothing else: a linear layer, not hooked, not patched."""
    return is_product(base) and _untouched(base)


def is_conv(base: nn.Module) -> bool:
    """The same of a convolution."""
    return type(base) in CONVS and CONVS[type(base)] is type(base).forward and _untouched(base)


def _untouched(base: nn.Module) -> bool:
    if "forward" in base.__dict__ or any(EVERYWHERE):
        return False
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)


def open_linear(inner: Stack, x: Tensor, gated: bool = False) -> tuple[Tensor, Tensor | None] | None:
    """(W, b) if calling the stack with x is F.linear(x, W, b) and nothing else; None where it may be more.

    It is more where the layer is a subclass, is hooked, patched, offloaded or quantised, where other adapters stand on
    it, where the dtypes differ or autocast chooses them, under torch.func and forward-mode differentiation, and in
    traces of torch.jit, which hold definitions alone: they serve training and evaluation, and any number of rows.
    `gated`: whether the shortcut lets the stack `gate` its weight.
    """
    if inner.last is not None or inner.extra is not None or inner.packed is not None or inner.gated is not gated:
        return None
    base = inner.layer._modules["base_layer"]
    kind, graph = type(base), torch.compiler.is_compiling()
    if not form(kind) if graph else (FORWARD if kind is nn.Linear else FORMS.get(kind)) is not kind.forward:
        return None
    if "forward" in base.__dict__ or any(EVERYWHERE):
        return None  # as `is_ordinary` tells, without calls, which cost more here than what they look at
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    held = base._parameters
    W = held.get("weight")
    if type(W) is not nn.Parameter or W.dtype is not x.dtype or "bias" not in held:  # some libraries take them away
        return None
    if x.dim() < 2 or type(x) not in PLAIN or x.is_nested:
        return None
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return None
    if not graph and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0 or _C._is_tracing()):
        return None
    turned = form(kind) == "turned" if graph else kind is not nn.Linear and kind in TURNED
    return W.mT if turned else W, held["bias"]


def summed_up(method: Delta, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
    """`method.forward` as one product with W', which costs less than what it does to activations if these are many.

    From how many on says its `sums_from`. None in training, and where calling the layer is more than its product.
    """
    if not inner.view.dense:
        return convolved(method, p, inner, x)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu or x.dtype not in WIDE:
        return None
    if x.numel() < LEAST or _C._is_tracing():  # and traces serve other numbers of rows
        return None
    held = open_linear(inner, x)
    if held is None or touched(x, held[0]) < method.sums_from * held[0].numel() or method.drop_rate(p):
        return None
    D = method.delta(p, held[0])
    return F.linear(x, held[0] + D, held[1]) if D.dtype is x.dtype else None


def convolved(method: Delta, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
    """The same over torch's own convolution: one with W', in place of another one beside it; None elsewhere.

    In training, too, where the update is a matrix that is convolved with by itself, unless its factors are thin.
    """
    base: Any = inner.base
    own, graph = method.makes_delta(p), torch.compiler.is_compiling()
    if inner.last is not None or inner.extra is not None or inner.packed is not None or not is_conv(base):
        return None
    if x.dtype not in WIDE or type(x) not in PLAIN or is_autocast(x) or (inner.gated and not own):
        return None
    if type(base._parameters.get("weight")) is not nn.Parameter or (transformed() and not graph):
        return None
    if not own and (graph or torch.is_grad_enabled() or not (x.is_cpu and _one_kernel(method, p))):
        return None
    W, places = inner.live_weight(), x.numel() // max(1, base.in_channels * math.prod(base.stride))
    many = graph or (places >= MANY if own else places * sum(W.shape) >= whole.REACH * W.numel())
    if W.dtype is not x.dtype or method.drop_rate(p):
        return None
    if own and not inner.gated and base.groups == 1 and (low := method.short(p)) is not None:
        (A, B, scale), most = low, W.numel() / (len(low[0]) * sum(W.shape))  # passes of thin products, in one of W's
        if most > (3 if graph or torch.is_grad_enabled() else places / MAKING):
            return (y := inner(x)) + inner.low_rank(x, A, B, 0.0, scale).to(y.dtype)
    if not (many or W.numel() <= FEW):
        return None
    kernel = inner.view.raw(base, inner.gate(method.live_weight(p, W), W))
    if (order := FORMATS.get(kernel.dim())) is not None and not base.weight.is_contiguous():
        kernel = kernel.contiguous(memory_format=order)
    made: Tensor = base._conv_forward(x, kernel, method.bias(p, inner.bias()))
    return made


def with_delta(method: Delta, p: Adapter, W: Tensor) -> Tensor:
    """W + delta(W) as a forward reads it; in evaluation in few passes over memory, and little that was never touched.

    One product has W in it where s B A, (O, I), is all that is added. On a CPU another definition is computed a block
    of rows at a time, so that what it makes on the way stays in the caches.
    """
    learns = torch.is_grad_enabled() or p.layer.training
    if learns or W.dim() != 2 or W.dtype not in WIDE or type(W) not in PLAIN or is_autocast(W):
        return (W + method.read_delta(p, W)).to(W.dtype)
    large = W.is_cpu and W.numel() >= 2 * BLOCK and not (transformed() or reused())
    place = recycled.empty_like(W, recycled.TILE_BYTES) if large else None
    if method.factored and (factors := _alike(method, p, W)) is not None:
        A, B, scale = factors
        return torch.addmm(W, B, A, alpha=scale, out=place)
    if place is None or not (method.mergeable and method.rowwise(p)):
        return (W + method.read_delta(p, W)).to(W.dtype)
    step = max(1, BLOCK // W.shape[1])
    for rows in (slice(start, start + step) for start in range(0, len(W), step)):
        torch.add(w := W[rows], method.delta(p, w, rows).to(W.dtype), out=place[rows])
    return place


def _alike(method: Any, p: Adapter, W: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, s) of a low-rank method, if they are torch's own tensors of W's dtype."""
    method.refuse_merge(p)
    (A, B), scale = method.factors(p), method.scaling(p)
    own = type(A) in PLAIN and type(B) in PLAIN and A.dtype is B.dtype is W.dtype
    return (A, B, scale) if own and type(scale) is float else None


def _one_kernel(method: Delta, p: Adapter) -> bool:
    """Whether one W' says what an adapter does to a convolution, and its modules need not be called."""
    if not method.mergeable or method.by_modules(p) or (p.layer.training and not method.direct):
        return False
    return not (method.whole and p.layer.view.groups(p.layer.get_base_layer()) > 1)


def inside(method: Delta, p: Adapter, inner: Stack, x: Tensor) -> Tensor | None:
    """`method.forward` over a plain linear layer with the update inside its product, where that is quicker; else None.

    For methods that add what their dense update makes.
    """
    held = open_linear(inner, x, inner.gated)
    if held is None or method.drop_rate(p) or (inner.gated and (method.short(p) or x.dtype not in WIDE)):
        return None
    (W, b), low = held, method.short(p)
    if low is not None:
        return lowrank.linear(x, W, b, *low) if low[0].dtype is W.dtype or not W.requires_grad else None
    apart = not torch.compiler.is_compiling() and W.numel() > FEW
    if apart and x.numel() < MANY * x.shape[-1]:
        return None
    D = method.live_delta(p, W)
    if D.dtype is W.dtype and D.dtype in WIDE:
        return F.linear(x, inner.gate(W + D, W), b)
    kind = x.dtype if x.dtype is torch.bfloat16 else D.dtype  # which has the range for any update
    return (F.linear(x, W, b) + F.linear(x.to(kind), D.to(kind))).to(W.dtype)  # W + D would forget small ones


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # in which numbers may lie, and those of outputs then
MAKING = 12  # products with a matrix take as long as making it of factors
MANY = 32  # places of an input, from which on a second product with a matrix costs more than adding that to W
FEW = 2**14  # numbers in a weight, up to which it always does
BLOCK = 2**17  # numbers of W' that are made at a time
LEAST = 2**14  # numbers in an input, of fewer of which making W' takes longer
