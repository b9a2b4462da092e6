"""Where only plain operations may be used, and the classes and dtypes of tensors that others are for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

P = ParamSpec("P")
T = TypeVar("T")
PLAIN = (Tensor, nn.Parameter)  # torch's own: of another class, operations may mean another thing
HELD = (*PLAIN, nn.Buffer)  # the same, of what modules hold
WIDE = (torch.float32, torch.float64)
NARROW = (torch.float16, torch.bfloat16)
_AS_IT_IS = nullcontext()
_STANDING_IN = [getattr(torch._C._TorchDispatchModeKey, kind) for kind in ("FAKE", "PROXY", "FUNCTIONAL")]
peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
exporting = getattr(torch.compiler, "is_exporting", torch.jit.is_scripting)  # the latter is False; torch < 2.7


def transformed() -> bool:
    """True where only plain operations may be used: under compile, traces, torch.func, forward-mode differentiation."""
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return torch._C._is_tracing()  # for other numbers of rows, too


def lifted() -> bool:
    """Whether torch.func or forward-mode differentiation gives operations another meaning; not for graphs."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def eager() -> bool:
    """Whether operations run as they are written: not `transformed`, and under no autocast."""
    return not (transformed() or torch._C._is_any_autocast_enabled())


def recorded() -> bool:
    """Whether operations are written down for other inputs and tensors: in graphs, and in traces of torch.jit."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def exported() -> bool:
    """Whether a model is on its way to ONNX, which solves no equations."""
    return recorded() and torch.onnx.is_in_onnx_export()


def ungraded(function: Callable[P, T]) -> Callable[P, T]:
    """A function under `torch.no_grad()`, whose result its callers detach.

    In exported programs that would be a graph within the graph, through which no pipeline can be cut.
    """
    quiet = torch.no_grad()(function)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return (function if exporting() else quiet)(*args, **kwargs)

    return run


def lasting() -> bool:
    """Whether what is made now can be kept: not in graphs, nor under modes that may make other tensors (fake ones)."""
    return not (recorded() or torch._C._len_torch_dispatch_stack())


def faking() -> bool:
    """Whether operations run on what stands for tensors: in graphs that are being made, and under fake tensors."""
    if recorded():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _STANDING_IN))


def reused() -> bool:
    """Whether selective checkpointing gives the results of operations again, so that none may be changed where it lies.

    torch finds such a change by the version of the tensor, and not at all where it went through an `_unsafe_view`.
    """
    if not torch._C._len_torch_dispatch_stack():
        return False
    kinds = _selective()
    return any(isinstance(mode, kinds) for mode in _get_current_dispatch_mode_stack())


reused._dynamo_marked_constant = True  # type: ignore[attr-defined]  # graphs that checkpoint do so by themselves


@cache
def _selective() -> tuple[type, ...]:
    """The modes of selective checkpointing; it is the only thing in torch that gives results of operations again."""
    from torch.utils import checkpoint

    names = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    return tuple(getattr(checkpoint, name) for name in names if hasattr(checkpoint, name))


def changed(y: Tensor, how: str, *args: Any, **more: Any) -> Tensor:
    """`y.how_(...)` of a result that is nobody else's; beside it where operations are `reused`."""
    found: Tensor = getattr(y, how if reused() else how + "_")(*args, **more)
    return found


def numbered(t: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at: there are none on the meta device, nor in torch's fake tensors."""
    return not (t.is_meta or hasattr(t, "fake_mode"))


def single(t: Tensor) -> Tensor:
    """t in single precision at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def once(make: Callable[P, T]) -> Callable[P, T]:
    """`functools.cache` of a function that makes a tensor, which is kept only if it is `lasting`.

    Its arguments come by place.
    """
    kept: dict[Any, T] = {}

    @wraps(make)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        if not faking() and args in kept:
            return kept[args]
        made = make(*args, **kwargs)
        if lasting():
            kept[args] = made
        return made

    found.__dict__["cache_clear"] = kept.clear
    return found


def ordinary() -> AbstractContextManager[Any]:
    """While open, tensors are made that may be trained, also where the caller is in inference mode."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return _AS_IT_IS
    return torch.inference_mode(False)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """While open, operations on the device of x run in the dtypes that they are written in."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else _AS_IT_IS


def shaped(y: Tensor, lead: Sequence[int]) -> Tensor:
    """y (N, k), which a node has made, as (*lead, k) and no view: torch refuses to change a node's view in place."""
    if type(y) is Tensor and not (y._is_view() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing()):
        return y.contiguous().resize_(*lead, y.shape[-1])  # the quickest way, which modes that compute nothing have not
    return torch.ops.aten._unsafe_view.default(y, (*lead, y.shape[-1]))


def is_autocast(x: Tensor) -> bool:
    """Whether autocast chooses the dtypes of products with x; torch knows of none on the meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


@cache
def has_double(device: torch.device) -> bool:
    """Whether a device computes in double precision, as Apple's do not."""
    try:
        return torch.empty(1, dtype=torch.float64, device=device).dtype is torch.float64
    except (TypeError, RuntimeError):
        return False


def node(kind: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`kind.apply` without what torch does to every argument for torch.func, under which it must not be called."""
    return super(torch.autograd.Function, kind).apply  # type: ignore[misc]
